"""When a run no longer needs its teacher."""

from __future__ import annotations

from dwt_ds.config.objective import FOLLOW_THE_RUN, Schedule
from dwt_ds.config.schema import RunConfig

LOOK_EVERY_STEPS = 10
"""An adaptive weight can release the teacher at multiples of this many optimizer steps."""


class TeacherRelease:
    """The rule of `teacher.release`: the same steps on every rank, after every resume, and with any `train.log_every`.

    A schedule that comes to 0 and stays there releases the teacher at that step. An adaptive weight releases it once
    the weight has been below `release_below_share` of its start for `release_after_steps`.
    """

    step: int | None
    """Optimizer steps after which the schedule's soft weight stays 0; None: never, or not known before the run."""
    follows_losses: bool
    """Whether an adaptive weight decides during the run."""

    def __init__(self, config: RunConfig, total_steps: int) -> None:
        schedule = config.distill.soft_weight
        self._is_on = config.teacher.path is not None and config.teacher.release == "auto"
        self.step = zero_from(schedule, total_steps) if self._is_on else None
        self.follows_losses = self._is_on and self.step is None and schedule.schedule == "adaptive"
        self._idle_steps = config.teacher.release_after_steps or schedule.average_steps
        self._total_steps = total_steps

    def at_start(self, step: int, released: int | None, *, same_rule: bool = True) -> int | None:
        """The step at which the teacher was released, for a start at `step`; None: the run needs its teacher.

        `released` is what the checkpoint says, and `same_rule` whether its run had the same teacher, soft weight and
        rule of release. A longer run, or other settings, can need the teacher again.
        """
        if self.follows_losses:
            return released if same_rule else None
        if self.step is None or step < self.step:
            return None
        if released is None and step >= self._total_steps:
            return None  # the run came to its end with the teacher, and has its last evaluation to do
        return step if released is None else released

    def looks(self, done: int) -> bool:
        """Whether the adaptive weight is copied to the host after `done` optimizer steps, for `is_due` one step later:
        by then the copy is there, and the host need not wait."""
        return self.follows_losses and (done + 1) % LOOK_EVERY_STEPS == 0

    def is_due(self, done: int, idle_steps: float | None) -> bool:
        """Whether to release the teacher after `done` optimizer steps; never after the last one, where the run ends.

        `idle_steps`: for how many steps the adaptive weight had been low one step ago, if `looks` was true there; the
        same number on all ranks.
        """
        if done >= self._total_steps:
            return False
        if self.follows_losses:
            return idle_steps is not None and idle_steps >= self._idle_steps
        return self.step is not None and done >= self.step


def check_something_is_trained(config: RunConfig, total_steps: int) -> None:
    """Refuse a run without a hard loss that has no soft loss either, from its start or after a release (ValueError)."""
    if config.distill.hard_weight > 0:
        return
    if config.teacher.path is None:
        raise ValueError("distill.hard_weight=0: without a teacher nothing is left to train on; set it above 0")
    rule, schedule = TeacherRelease(config, total_steps), config.distill.soft_weight
    may_fall = rule.follows_losses and (schedule.end or 0.0) < config.teacher.release_below_share * schedule.start
    if may_fall or (rule.step is not None and rule.step < total_steps):
        raise ValueError(
            "distill.hard_weight=0: after the teacher's release nothing is left to train on; set it above 0, or "
            "teacher.release to never"
        )


def zero_from(schedule: Schedule, total_steps: int) -> int | None:
    """The first optimizer step, counted from 0, from which a schedule stays at 0; None if it never does.

    It can lie beyond the run's last step.
    """
    if schedule.start == 0 and not schedule.end:
        return 0
    if schedule.end == 0 and schedule.schedule not in FOLLOW_THE_RUN:
        return schedule.length(total_steps)
    return None


def work_left(done: int, total_steps: int, release: int | None, share_without_teacher: float) -> float:
    """The steps after step `done`, in steps of today's work.

    `release`: the step of the teacher's release, if it is known; each later one is `share_without_teacher` of a step.
    """
    left = total_steps - done
    taught = left if release is None else min(left, max(0, release - done))
    return taught + (left - taught) * share_without_teacher
