"""A rank's micro-batches of each step, with the teacher's view of each; the first of a step ahead of time."""

from __future__ import annotations

import time
from collections.abc import Iterator

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.batches import Batch, StepBatches, step_loader
from dwt_ds.distill.objective import TeacherView
from dwt_ds.engine import ranks
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.run.meter import Meter


class MicroBatches:
    """Of the steps from `first_step` on, in order; `batches` says which rows they have.

    Args:
        batches: with what the teacher reads, too.
        teacher: None if the student trains alone.
        config: how many processes load them.
        meter: is told how long this process waits for them.
    """

    def __init__(
        self,
        batches: StepBatches,
        teacher: TeacherEngine | None,
        first_step: int,
        total_steps: int,
        config: DataConfig,
        meter: Meter,
    ) -> None:
        self._device = ranks.device()
        self.batches = batches if teacher is not None else batches.without_teacher()
        self._teacher, self._total_steps, self._meter = teacher, total_steps, meter
        self._workers = int(self._device.type == "cuda") if config.workers == "auto" else config.workers
        self._loader = self._load(first_step)
        self._prefetched: list[Batch] | None = None
        """The next step's, where they were taken ahead of time."""
        self._first_taught: tuple[Batch, TeacherView | None] | None = None
        """The first of those."""

    def next_step(self) -> list[Batch]:
        """Those of the next step, on the host."""
        micro_batches = self._take() if self._prefetched is None else self._prefetched
        self._prefetched = None
        assert micro_batches is not None  # the loader has all steps
        return micro_batches

    def with_teacher(self, micro_batches: list[Batch]) -> Iterator[tuple[Batch, TeacherView | None]]:
        """Each micro-batch of a step on the device, with the teacher's view of it; None without a teacher."""
        for batch in micro_batches:
            ahead, self._first_taught = self._first_taught, None
            yield ahead or self._taught(batch)

    def prefetch(self) -> None:
        """Start the teacher's pass of the next step's first micro-batch, which does not depend on its update.

        Before the host waits for this step's gradient norm. So the device has work while the host starts the update.
        """
        self._prefetched = self._take()
        if self._prefetched:
            self._first_taught = self._taught(self._prefetched[0])

    def release_teacher(self, done: int) -> None:
        """Free the teacher after `done` optimizer steps; the following steps are the student's alone."""
        assert self._teacher is not None
        self._prefetched = self._first_taught = None  # made for the teacher; they hold its head
        self._teacher.release()
        self._teacher, self.batches = None, self.batches.without_teacher()
        self._loader = self._load(done)

    def _load(self, first_step: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step from `first_step` on."""
        steps, on_gpu = range(first_step, self._total_steps), self._device.type == "cuda"
        try:
            return iter(step_loader(self.batches, steps, self._workers, pin_memory=on_gpu))
        except OSError as error:
            raise OSError(
                f"data.workers={self._workers}: the processes that load batches cannot be started ({error}); make room "
                "in /dev/shm and for more processes, or set data.workers=0"
            ) from error

    def _take(self) -> list[Batch] | None:
        """None after the last step."""
        asked = time.perf_counter()
        micro_batches = next(self._loader, None)
        self._meter.add_wait(time.perf_counter() - asked)
        return micro_batches

    def _taught(self, batch: Batch) -> tuple[Batch, TeacherView | None]:
        batch = batch.to(self._device)
        return batch, self._teacher(batch) if self._teacher else None
