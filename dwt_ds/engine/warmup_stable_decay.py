"""A learning-rate schedule that DeepSpeed lacks: the rate rises, stays, and falls at the end."""

# No `from __future__ import annotations`: the kinds of the JSON's values are read from the constructor's annotations.

import math
from typing import Any

WARMUP_STABLE_DECAY_LR = "WarmupStableDecayLR"
DECAY_TYPES = ("linear", "1-sqrt")
DECAY_RATIO = 0.2


class WarmupStableDecayLR:
    """The arguments are the JSON's `scheduler.params`. Like WarmupCosineLR it scales the optimizer's own rates.

    Sources: Hu et al. (2024), arXiv 2404.06395, for the schedule; Hägele et al. (2024), arXiv 2405.18392, for the
    shape `1-sqrt` and for a decay over a fifth of the steps.

    Args:
        optimizer: whose parameter groups have the highest rates.
        total_num_steps: optimizer steps of the run.
        warmup_num_steps: optimizer steps over which the rate rises.
        warmup_min_ratio: share of the highest rate that the rise starts from.
        warmup_type: shape of the rise, `linear` or `log`.
        decay_num_steps: the last optimizer steps, over which the rate falls; None: `decay_ratio` says so.
        decay_ratio: the same as a share of the run.
        decay_type: shape of the fall, `linear` or `1-sqrt`.
        decay_min_ratio: share of the highest rate that the fall ends at, one step after the last.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_type: str = "linear",
        decay_num_steps: int | None = None,
        decay_ratio: float = DECAY_RATIO,
        decay_type: str = "linear",
        decay_min_ratio: float = 0.0,
    ) -> None:
        self.org_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._warmup_steps, self._warmup_type, self._start = warmup_num_steps, warmup_type, warmup_min_ratio
        decay_steps = decay_steps_of(decay_ratio, total_num_steps) if decay_num_steps is None else decay_num_steps
        self._full_until = max(warmup_num_steps, total_num_steps - decay_steps)
        self._zero_at, self._decay_type, self._end = total_num_steps + 1, decay_type, decay_min_ratio

    def rates(self, step: int) -> list[float]:
        """The rate of each parameter group at `step`, counted from 1."""
        if step <= self._full_until:
            ratio = self._start + (1.0 - self._start) * rise(step, self._warmup_steps, self._warmup_type)
        else:
            done = min(1.0, (step - self._full_until) / max(1, self._zero_at - self._full_until))
            left = 1.0 - (math.sqrt(done) if self._decay_type == "1-sqrt" else done)
            ratio = self._end + (1.0 - self._end) * left
        return [rate * ratio for rate in self.org_lrs]


def decay_steps_of(ratio: float, total_steps: int) -> int:
    """Optimizer steps of a decay over this share of the run."""
    return max(1, round(ratio * total_steps))


def rise(step: int, warmup_steps: int, warmup_type: str) -> float:
    """Share of the warm-up that is done at `step`: above 0 at step 1, 1 at the last step of the warm-up and later."""
    if step >= warmup_steps:
        return 1.0
    return step / warmup_steps if warmup_type == "linear" else math.log(1 + step) / math.log(1 + warmup_steps)
