"""The soft weight of each step of a run, and when the run no longer needs its teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from dwt_ds.distill.adaptive import AdaptiveWeight
from dwt_ds.distill.release import TeacherRelease
from dwt_ds.distill.schedules import value_at
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.manifest import RunState
from dwt_ds.engine.learning_rate import LearningRate
from dwt_ds.run.meter import Meter
from dwt_ds.run.resolve import Resolved
from dwt_ds.run.step_numbers import StepNumbers


class SoftWeight:
    """Follows the schedule, the learning rate or the losses, as the recipe says; 0 once the teacher is released."""

    released: int | None
    """Optimizer steps after which the teacher was released; None while it takes part."""

    def __init__(self, resolved: Resolved, state: RunState, learning_rate: LearningRate) -> None:
        self._distill, self._total_steps = resolved.config.distill, resolved.total_steps
        self._learning_rate = learning_rate
        self._release = TeacherRelease(resolved.config, resolved.total_steps)
        self._adaptive = _adaptive_weight(resolved, state)
        self.released = state.teacher_released
        self._idle_steps = self._look(state.step)

    def scheduled(self, step: int) -> float:
        """The weight of optimizer step `step` by its schedule; of an adaptive one the start."""
        if self.released is not None:
            return 0.0
        schedule = self._distill.soft_weight
        share = self._learning_rate.share_of_highest() if schedule.schedule == "learning_rate" else None
        return value_at(schedule, step, self._total_steps, share)

    def adaptive(self) -> Tensor | None:
        """The next step's weight by the losses so far, 0-d fp32; None where these do not decide it."""
        return self._adaptive.value() if self._adaptive is not None and self.released is None else None

    def observe(self, meter: Meter, numbers: StepNumbers) -> None:
        """Take in the losses of a step that was not skipped and in which the teacher took part; a collective if the
        weight follows them."""
        if self._adaptive is None:
            return
        losses = meter.losses()
        hard, soft = losses["hard"], losses["soft"]
        hard = torch.where(hard > 0, hard, torch.nan)  # of a step without a label it is 0: such a step is left out
        if numbers.aligned_share is not None:
            # What compares with the teacher's own loss. A step without aligned tokens has none and is left out.
            hard = torch.where(numbers.aligned_share > 0, losses["shared_hard"], torch.nan)
        elif "labelled_soft" in losses:
            soft = torch.where(soft.isfinite(), losses["labelled_soft"], torch.nan)  # on the tokens that `hard` is on
        self._adaptive.observe(hard, soft, 1.0 if self._distill.temperature_squared else numbers.temperature)

    def release_is_due(self, done: int) -> bool:
        """Whether to release the teacher after `done` optimizer steps; all ranks get the same answer. A collective."""
        looked, self._idle_steps = self._idle_steps, self._look(done)
        return self.released is None and self._release.is_due(done, None if looked is None else looked.number())

    def _look(self, done: int) -> ranks.HostCopy | None:
        """How many steps in a row the adaptive weight has been low, after `done` steps, the mean over the ranks; None
        if no release depends on it."""
        if self._adaptive is None or self.released is not None or not self._release.looks(done):
            return None
        return ranks.HostCopy(ranks.reduce_sum(self._adaptive.idle_steps.clone()) / ranks.world_size())

    def state_dict(self) -> dict[str, float]:
        """Of an adaptive weight, for the checkpoint's manifest; empty for others."""
        return {} if self._adaptive is None else self._adaptive.state_dict()


def _adaptive_weight(resolved: Resolved, state: RunState) -> AdaptiveWeight | None:
    schedule = resolved.config.distill.soft_weight
    if schedule.schedule != "adaptive" or state.teacher_loss is None:
        return None  # alone, a student has no soft loss to weigh
    low = resolved.config.teacher.release_below_share
    adaptive = AdaptiveWeight(schedule, state.teacher_loss, ranks.device(), low_share=low)
    if state.adaptive:
        adaptive.load_state_dict(state.adaptive)
    return adaptive
