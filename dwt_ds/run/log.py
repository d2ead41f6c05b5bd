"""What a run reports of its steps: printed lines, rows of metrics.jsonl, the monitors of the DeepSpeed JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dwt_ds.distill.release import TeacherRelease, work_left
from dwt_ds.engine import ranks
from dwt_ds.engine.student import StudentEngine, gradient_norm, loss_scale, peak_memory_bytes, write_monitors
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.meter import Meter
from dwt_ds.run.mfu import Utilization
from dwt_ds.run.progress import Progress
from dwt_ds.run.resolve import Resolved
from dwt_ds.run.step_numbers import StepNumbers


class RunLog:
    """Reports on rank 0; every rank has to call `step`.

    Args:
        first_step: optimizer steps taken before this start.
        utilization: None on all ranks but the first.
    """

    def __init__(
        self,
        resolved: Resolved,
        student: StudentEngine,
        folder: RunFolder,
        first_step: int,
        utilization: Utilization | None,
    ) -> None:
        self._student, self._folder, self._total_steps = student, folder, resolved.total_steps
        self.utilization = utilization
        self._release_step = TeacherRelease(resolved.config, resolved.total_steps).step
        self.progress = Progress(
            first_step,
            resolved.total_steps,
            hard_weight=resolved.config.distill.hard_weight,
            hidden_weight=resolved.config.distill.hidden_weight,
            shown=ranks.rank() == 0,
        )
        # The time that is left is estimated by the pace since this step.
        self._pace_step, self._pace_seconds = first_step, 0.0

    def say(self, done: int, text: str) -> None:
        """Print a line after `done` optimizer steps."""
        self.progress.say(f"step {done}/{self._total_steps}  {text}")

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row to metrics.jsonl and to the monitors."""
        if ranks.rank() == 0:
            self._folder.add_metrics(row)
            try:
                write_monitors(self._student, row)
            except OSError as error:
                # Training continues: there may be room again for the next row.
                self.progress.say(f"the monitors of the DeepSpeed JSON lack this row: {error}")

    def step(self, numbers: StepNumbers, meter: Meter, *, teacher_active: bool) -> None:
        """Report an optimizer step, and whether the teacher took part in it."""
        done = numbers.step + 1
        row = {
            "step": done,
            **meter.row(with_teacher=teacher_active),
            "soft_weight": float(numbers.soft_weight),
            "temperature": numbers.temperature,
            "learning_rate": numbers.learning_rate,
            "grad_norm": gradient_norm(self._student),
            "skipped_steps": int(self._student.skipped_steps),
            "teacher_active": teacher_active,
        }
        if numbers.aligned_share is not None and teacher_active:
            row["aligned_share"] = float(numbers.aligned_share)
        if self.utilization is not None:
            row |= self.utilization.shares(row["tokens_per_second"])
        scale = loss_scale(self._student)
        if scale is not None:
            row["loss_scale"] = scale
        seconds_a_step = (meter.seconds_since_start - self._pace_seconds) / (done - self._pace_step)
        share = 1.0 if self.utilization is None else self.utilization.share_without_teacher
        self.progress.line(
            row,
            peak_memory_bytes=peak_memory_bytes(ranks.device()),
            seconds_left=seconds_a_step * work_left(done, self._total_steps, self._release_step, share),
        )
        self.add(row)

    def teacher_released(self, done: int, parameters: int, meter: Meter) -> None:
        """Report that the teacher, of so many parameters, was freed; from here on pace and work are the student's."""
        self.say(done, f"teacher released: no soft loss from here on, {parameters:,} parameters freed")
        self._pace_step, self._pace_seconds = done, meter.seconds_since_start
        if self.utilization is not None:
            self.utilization = self.utilization.without_teacher()
