"""Counts and clocks of a run: what the metrics rows are made of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dwt_ds.config.schema import RunConfig
from dwt_ds.distill.objective import Losses
from dwt_ds.engine import ranks

Further = Literal["shared_hard", "labelled_soft", "hidden"]


def losses_with_teacher(config: RunConfig) -> list[Further]:
    """What losses have besides loss, hard and soft while the teacher takes part."""
    further: list[Further] = ["shared_hard"] if config.teacher.vocabulary == "shared" else []
    if config.distill.soft_positions != "labelled":
        further.append("labelled_soft")
    if config.distill.hidden_weight:
        further.append("hidden")
    return further


class Meter:
    """Adds up losses, tokens and seconds; only `row` and `tokens` wait for the device.

    Args:
        tokens: real tokens of all ranks before this start.
        elapsed_seconds: training time before this start.
        divisor: what DeepSpeed divides a micro-batch's loss by (`gradient_divisor`).
        further: `losses_with_teacher`; none for a student that trains alone.
    """

    def __init__(self, tokens: int, elapsed_seconds: float, divisor: int, further: Sequence[Further] = ()) -> None:
        device = ranks.device()
        self._divisor = divisor
        self._names = ("loss", "hard", "soft", *further)
        self._loss_parts = torch.zeros(len(self._names), device=device)
        self._step_means: Tensor | None = None
        self._tokens = torch.zeros((), dtype=torch.float64, device=device)
        self._tokens_before = tokens
        self._tokens_at_log = tokens
        self._seconds_before = elapsed_seconds
        self._started = self._log_started = time.perf_counter()
        self._waited_seconds = self._paused_seconds = 0.0

    def begin_step(self, tokens: Tensor) -> None:
        """Start a step of `tokens` real tokens, 0-d fp64, all ranks together."""
        self._tokens += tokens
        self._loss_parts.zero_()
        self._step_means = None

    def add(self, loss: Losses) -> None:
        """Add one of this rank's micro-batches."""
        # Those that come with the teacher are the last, and are missing after its release.
        parts = [part.detach() for part in (getattr(loss, name) for name in self._names) if part is not None]
        self._loss_parts[: len(parts)] += torch.stack(parts)
        self._step_means = None

    def add_wait(self, seconds: float) -> None:
        """Time spent waiting for data."""
        self._waited_seconds += seconds

    def add_pause(self, seconds: float) -> None:
        """Time spent on evaluation, checkpoints and exports, which rates leave out."""
        self._paused_seconds += seconds

    @property
    def tokens(self) -> int:
        """Real tokens so far, all ranks, all starts."""
        return self._tokens_before + int(self._tokens)

    @property
    def elapsed_seconds(self) -> float:
        """Training time so far, all starts."""
        return self._seconds_before + self.seconds_since_start

    @property
    def seconds_since_start(self) -> float:
        """Training time of this start."""
        return time.perf_counter() - self._started

    def losses(self) -> dict[str, Tensor]:
        """The step's loss, hard loss, soft loss and `further` ones: 0-d means over the global batch; every rank must
        call it."""
        return dict(zip(self._names, self._means().unbind(), strict=True))

    def _means(self) -> Tensor:
        """Summed over the ranks once a step, at the first call: by an adaptive weight, or for the step's row."""
        if self._step_means is None:
            self._step_means = ranks.reduce_sum(self._loss_parts.clone()) / self._divisor
        return self._step_means

    def row(self, *, with_teacher: bool = True) -> dict[str, Any]:
        """`losses` of the step, the `further` ones only `with_teacher`, and rates since the last row."""
        loss, hard, soft, *further = self._means().tolist()
        now, tokens = time.perf_counter(), self.tokens
        seconds = max(now - self._log_started - self._paused_seconds, 1e-9)
        row = {
            "loss": loss,
            "hard_loss": hard,
            "soft_loss": soft,
            **({f"{name}_loss": value for name, value in zip(self._names[3:], further)} if with_teacher else {}),
            "tokens": tokens,
            "tokens_per_second": (tokens - self._tokens_at_log) / seconds,
            "elapsed_seconds": self.elapsed_seconds,
            "data_wait_share": self._waited_seconds / seconds,
        }
        self._log_started, self._tokens_at_log = now, tokens
        self._waited_seconds = self._paused_seconds = 0.0
        return row
