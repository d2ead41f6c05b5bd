"""Evaluation on the held-out text: of the teacher before training, of the student whenever it is due."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dwt_ds.data.batches import Batch, validation_batches
from dwt_ds.data.prepared import PreparedData
from dwt_ds.distill.evaluate import (
    HeldOut,
    TeacherHeldOut,
    held_out_loss,
    shared_held_out_loss,
    teacher_held_out_loss,
)
from dwt_ds.distill.schedules import value_at
from dwt_ds.engine import ranks
from dwt_ds.engine.student import StudentEngine
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.run.resolve import Resolved
from dwt_ds.run.vocabulary import OtherVocabulary


class Evaluation:
    """Losses on the validation rows, the same ones with the same masks each time.

    Args:
        resolved: the run's settings.
        data: its data folder.
        other: the teacher's vocabulary where that may differ from the data's.
    """

    def __init__(self, resolved: Resolved, data: PreparedData, other: OtherVocabulary | None = None) -> None:
        self._config, self._total_steps = resolved.config, resolved.total_steps
        self._vocab_size = resolved.corpus.vocab_size
        self._data, self._other = data, other

    def is_due(self, done: int) -> bool:
        """Whether the student is evaluated after `done` optimizer steps."""
        every = self._config.train.eval_every
        return done > 0 and (done == self._total_steps or (every > 0 and done % every == 0))

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches, on its device; every rank has the same number of them."""
        micro_batches = validation_batches(
            self._data.validation,
            self._data.facts,
            self._config.data,
            micro_batch_size=self._config.train.micro_batch_size,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            max_rows=self._config.train.eval_rows,
            teacher_tokens=None if self._other is None else self._other.tokens,
        )
        return (batch.to(ranks.device()) for batch in micro_batches)

    def teacher_loss(self, teacher: TeacherEngine) -> TeacherHeldOut:
        """The teacher's own, before `keep_shared`; NaN without held-out rows."""
        where = self._config.distill, ranks.reduce_sum, ranks.device()
        if self._other is None:
            return TeacherHeldOut(teacher_held_out_loss(teacher, self.batches(), self._vocab_size, *where))
        return shared_held_out_loss(teacher, self.batches(), self._other.shared, self._other.size, *where)

    def student_losses(
        self, student: StudentEngine, teacher: TeacherEngine | None, batches: Iterable[Batch], done: int
    ) -> HeldOut | None:
        """The student's losses on `batches` after `done` optimizer steps, at the temperature of the last one.

        None where there is nothing to predict in them.
        """
        temperature = value_at(self._config.distill.temperature, done - 1, self._total_steps)
        student.eval()
        losses = held_out_loss(student, teacher, batches, temperature, ranks.reduce_sum, ranks.device())
        student.train()
        return losses
