"""Values of the soft weight and the temperature over training."""

from __future__ import annotations

import math

from dwt_ds.config.objective import Schedule


def value_at(schedule: Schedule, step: int, total_steps: int, rate_share: float | None = None) -> float:
    """Value for optimizer step `step` (counted from 0) of a run of `total_steps`; `start` for an adaptive one.

    Lee et al. (2023), section 4.2, find that a large soft weight speeds up the start and hurts the end. The schedules
    other than `constant` keep the first effect and avoid the second. A weight that follows the learning rate is one of
    Peng et al. (2024), arXiv 2410.16215.

    Args:
        rate_share: learning rate of the step as a share of its highest; the schedule `learning_rate` needs it.
    """
    if schedule.schedule in ("constant", "adaptive"):
        return schedule.start
    if schedule.schedule == "learning_rate":
        assert rate_share is not None  # of the caller that trains
        end = schedule.end or 0.0
        return end + (schedule.start - end) * rate_share
    assert schedule.end is not None  # Schedule refuses to be built without it
    progress = step / schedule.length(total_steps)
    start, end = schedule.start, schedule.end
    if progress >= 1.0:
        return end
    if schedule.schedule == "linear":
        return start + (end - start) * progress
    if schedule.schedule == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule.schedule == "exponential":
        return start * (end / start) ** progress
    return start  # step: all of `start` until the span is over
