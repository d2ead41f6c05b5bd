"""What a person sees of a run: one line a logged step, and a bar where there is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from dwt_ds.base.words import GIB
from dwt_ds.distill.metrics_keys import eval_losses


class Progress:
    """Prints for rank 0; silent on the others."""

    def __init__(
        self,
        first_step: int,
        total_steps: int,
        *,
        hard_weight: float = 1.0,
        hidden_weight: float = 0.0,
        shown: bool,
    ) -> None:
        self._total_steps = total_steps
        self._weights = hard_weight, hidden_weight
        self._shown = shown
        silent = not (shown and sys.stdout.isatty())
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=silent, file=sys.stdout)

    def advance(self) -> None:
        """One optimizer step is done."""
        self._bar.update()

    def line(self, row: Mapping[str, Any], *, peak_memory_bytes: int, seconds_left: float) -> None:
        """The line of a logged step, from its metrics row."""
        self.say(
            f"{step_words(row, self._total_steps, *self._weights)}  mem {peak_memory_bytes / GIB:.1f} GiB"
            f"  ETA {clock(seconds_left)}"
        )

    def say(self, text: str) -> None:
        """Any other line."""
        if self._shown:
            print_line(text)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def step_words(row: Mapping[str, Any], total_steps: int, hard_weight: float, hidden_weight: float) -> str:
    """A logged step in words, from its metrics row."""
    hard = "hard" if hard_weight == 1 else f"{hard_weight:.3g} x hard"
    # It is 0 where no teacher takes part.
    soft = f" + {row['soft_weight']:.3g} x soft {row['soft_loss']:.4f}" if row["soft_loss"] else ""
    if row.get("hidden_loss"):
        soft += f" + {row['soft_weight'] * hidden_weight:.3g} x hidden {row['hidden_loss']:.4f}"
    # Runs of earlier versions have neither of them.
    utilization = f"  MFU {row['mfu']:.0%}" if "mfu" in row else ""
    if "mfu_student" in row and row["mfu_student"] != row["mfu"]:
        utilization += f" ({row['mfu_student']:.0%} student)"
    waiting = f"  data wait {row['data_wait_share']:.0%}" if "data_wait_share" in row else ""
    return (
        f"step {row['step']}/{total_steps}  loss {row['loss']:.4f} = {hard} {row['hard_loss']:.4f}{soft}"
        f"  lr {row['learning_rate']:.2e}  grad {row['grad_norm']:.2f}  {row['tokens_per_second']:,.0f} tokens/s"
        f"{utilization}{waiting}"
    )


def evaluation_words(row: Mapping[str, Any]) -> str:
    """An evaluation in words, from its metrics row."""
    # What was not finite is null in the file.
    losses = {name: float("nan") if loss is None else loss for name, loss in eval_losses(row).items()}
    parts = []
    if "" in losses:
        own = f"hard {losses.pop(''):.4f}"
        if row.get("eval_soft_loss"):  # 0 for a student that has no teacher
            own += f", soft {row['eval_soft_loss']:.4f}"
        if "eval_shared_hard_loss" in row:
            own += f"; on shared entries {row['eval_shared_hard_loss']:.4f}"
        if "teacher_shared_hard_loss" in row:
            own += f", the teacher's {row['teacher_shared_hard_loss']:.4f}"
        parts.append(own)
    if losses:
        parts.append(", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return f"held-out: {'; '.join(parts)}"


def print_line(text: str) -> None:
    """Print at once, above a bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def clock(seconds: float) -> str:
    """`1h02m`, `2m05s` or `9s`."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
