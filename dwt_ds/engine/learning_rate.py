"""The learning rate of every optimizer step, under each schedule that the JSON can name.

DeepSpeed sets the rate after a step, from the number of the step before: under its own warm-ups, the first two steps
train at the rate of step 0 and all others two steps late. Here, step k (counted from 1) trains at the rate that its
formula gives for k. docs/learning_rate.md has the formulas.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.runtime import lr_schedules

from dwt_ds.engine.warmup_stable_decay import WARMUP_STABLE_DECAY_LR, WarmupStableDecayLR, rise

SCHEDULES: dict[str, type] = {
    **{name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES},
    WARMUP_STABLE_DECAY_LR: WarmupStableDecayLR,
}
"""Each type that the JSON's `scheduler` can name, with the class that takes its `params`."""
WITHOUT_HIGHEST_RATE = "LRRangeTest"
"""Its rate rises for as long as the run lasts."""


class LearningRate:
    """A scheduler for `deepspeed.initialize`: sets the rate of the step that comes next (OneCycle also the momentum).

    Runs that began under a version before this class keep DeepSpeed's timing to their end, so that they continue as
    they would have.

    Args:
        optimizer: whose parameter groups get the rate.
        section: the JSON's `scheduler`, without "auto".
    """

    def __init__(self, optimizer: torch.optim.Optimizer, section: Mapping[str, Any]) -> None:
        schedule = SCHEDULES[section["type"]]
        self._optimizer = optimizer
        self._schedule = schedule(optimizer, **section["params"])
        bound = inspect.signature(schedule).bind(optimizer, **section["params"])
        bound.apply_defaults()
        self._settings = bound.arguments
        self._formula = _FORMULAS.get(section["type"])
        self._may_be_late = section["type"] in lr_schedules.VALID_LR_SCHEDULES
        self._taken = 0
        self.two_steps_late = False
        """Whether the run keeps DeepSpeed's timing."""
        self.set_rate()

    def set_rate(self) -> None:
        """Set the rate of the next step."""
        step = self._taken + 1
        if self._formula is None or self.two_steps_late:
            self._schedule.step(step - 2)  # the argument is the index of the step before, counted from 0
        else:
            lr_schedules.update_lr(self._optimizer.param_groups, self._formula(step, self._settings, self._schedule))

    def share_of_highest(self) -> float:
        """The rate of the next step as a share of the highest that the schedule has, within 0 and 1."""
        highest = getattr(self._schedule, "max_lrs", None) or self._schedule.org_lrs
        return min(1.0, max(float(group["lr"]) for group in self._optimizer.param_groups) / max(highest))

    def step(self) -> None:
        """Called by DeepSpeed after each step that was not skipped."""
        self._taken += 1
        self.set_rate()

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints; `counts_from` is missing where DeepSpeed's timing was used."""
        state: dict[str, Any] = {"last_batch_iteration": self._taken - 1}
        return state if self.two_steps_late else state | {"counts_from": 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state; `set_rate` has to follow once the optimizer is loaded as well."""
        self._taken = state["last_batch_iteration"] + 1
        self.two_steps_late = self._may_be_late and "counts_from" not in state and self._taken > 0


def _rise(step: int, settings: Mapping[str, Any]) -> float:
    return rise(step, settings["warmup_num_steps"], settings["warmup_type"])


def _fall(step: int, settings: Mapping[str, Any]) -> float:
    """Share of the decay that is done at `step`: 0 where the warm-up ends, 1 one step after the last step."""
    if "total_num_steps" not in settings:  # WarmupLR, which has none
        return 0.0
    warmup_steps, total_steps = settings["warmup_num_steps"], settings["total_num_steps"]
    return min(1.0, max(0, step - warmup_steps) / max(1, total_steps + 1 - warmup_steps))


def _warmup(step: int, settings: Mapping[str, Any], deepspeeds: Any) -> list[float]:
    share = _rise(step, settings) * (1.0 - _fall(step, settings))
    return [low + (high - low) * share for low, high in zip(deepspeeds.min_lrs, deepspeeds.max_lrs)]


def _warmup_and_cosine(step: int, settings: Mapping[str, Any], deepspeeds: Any) -> list[float]:
    start, end = settings["warmup_min_ratio"], settings["cos_min_ratio"]
    if step <= settings["warmup_num_steps"]:
        ratio = start + (1.0 - start) * _rise(step, settings)
    else:
        ratio = end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * _fall(step, settings)))
    return [peak * ratio for peak in deepspeeds.org_lrs]


# For the others, LRRangeTest and OneCycle, DeepSpeed's classes give step 1 the initial rate that they promise.
_FORMULAS: dict[str, Callable[[int, Mapping[str, Any], Any], list[float]]] = {
    "WarmupLR": _warmup,
    "WarmupDecayLR": _warmup,
    "WarmupCosineLR": _warmup_and_cosine,
    WARMUP_STABLE_DECAY_LR: lambda step, _, ours: ours.rates(step),
}
