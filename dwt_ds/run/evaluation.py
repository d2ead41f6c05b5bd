"""Evaluation on the held-out text: of the teacher before training, of the student whenever it is due."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from dwt_ds.base.words import prefix_errors
from dwt_ds.config.schema import DataConfig, RunConfig, TrainConfig
from dwt_ds.data.batches import Batch, validation_batches
from dwt_ds.data.overlap import Overlap
from dwt_ds.data.prepared import PreparedData
from dwt_ds.data.tokenizer import TokenizerFacts
from dwt_ds.distill.adaptive import check_measured
from dwt_ds.distill.evaluate import TeacherHeldOut, held_out_loss, teacher_held_out_loss
from dwt_ds.distill.metrics_keys import eval_key
from dwt_ds.distill.schedules import value_at
from dwt_ds.engine import ranks
from dwt_ds.engine.student import StudentEngine
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.run.other_vocabulary import OtherVocabulary
from dwt_ds.run.resolve import Resolved


def open_eval_sets(train: TrainConfig) -> dict[str, PreparedData]:
    """The data folders of `train.eval_sets` by name (ValueError, FileNotFoundError of one line)."""
    opened = {}
    for name, path in (train.eval_sets or {}).items():
        with prefix_errors(f"train.eval_sets.{name}"):
            opened[name] = PreparedData.open(path)
    return opened


def check_eval_sets(resolved: Resolved, sets: Mapping[str, PreparedData], facts: TokenizerFacts) -> None:
    """Refuse a set without a token to predict, or whose rows cannot be masked as the recipe says (ValueError)."""
    train, masks = resolved.config.train, _masks(resolved.config)
    for name, data in sets.items():
        with prefix_errors(f"train.eval_sets.{name}"):
            size, most = train.micro_batch_size, train.eval_rows
            batches = validation_batches(data.validation, facts, masks, micro_batch_size=size, max_rows=most)
            if not any(len(batch.labels) for batch in batches):
                raise ValueError(f"{data.folder}: its held-out rows have no token to predict; prepare more text")


class Evaluation:
    """Losses on the validation rows, the same ones with the same masks each time.

    Args:
        sets: those of `train.eval_sets` by name; they have the data folder's tokenizer.
        other: the teacher's vocabulary where that may differ from the data's.
        overlap: with that vocabulary, on rank 0; rows of metrics.jsonl have it.
    """

    def __init__(
        self,
        resolved: Resolved,
        data: PreparedData,
        sets: Mapping[str, PreparedData],
        other: OtherVocabulary | None = None,
        overlap: Overlap | None = None,
    ) -> None:
        self._config, self._total_steps = resolved.config, resolved.total_steps
        self._vocab_size = resolved.corpus.vocab_size
        self._data, self._sets, self._other, self._overlap = data, sets, other, overlap
        self._measured: TeacherHeldOut | None = None

    def release_teacher(self) -> None:
        """Drop what only a teacher with another vocabulary needs."""
        self._other = self._overlap = None

    def is_due(self, done: int) -> bool:
        """Whether the student is evaluated after `done` optimizer steps."""
        every = self._config.train.eval_every
        return done > 0 and (done == self._total_steps or (every > 0 and done % every == 0))

    def measure_teacher(self, teacher: TeacherEngine | None, before: TeacherHeldOut | None) -> TeacherHeldOut | None:
        """The teacher's own loss, as an earlier start found it `before`, or measured now; None if it is not known.

        Raises AllRanksError where a teacher that takes part has none, and the soft weight follows it.
        """
        self._measured = self.teacher_loss(teacher) if teacher is not None and before is None else before
        if teacher is not None:
            with ranks.raise_on_all_ranks():
                check_measured(self._config, self._measured and self._measured.hard_loss)
        return self._measured

    def teacher_loss(self, teacher: TeacherEngine) -> TeacherHeldOut | None:
        """The teacher's own, before `keep_shared`; None where the held-out rows have no token to predict."""
        where = self._config.distill, ranks.reduce_sum, ranks.device()
        # With the masks of training, since the adaptive weight compares it with the student's training loss.
        batches = self._batches(self._data, self._config.data, for_teacher=True)
        other = self._other
        size, shared = (self._vocab_size, None) if other is None else (other.size, other.shared)
        return teacher_held_out_loss(teacher, batches, size, *where, shared)

    def student_losses(
        self,
        student: StudentEngine,
        teacher: TeacherEngine | None,
        until_stopped: Callable[[Iterator[Batch]], Iterator[Batch]],
        done: int,
    ) -> dict[str, float]:
        """The student's losses, as metrics.jsonl has them, after `done` optimizer steps, at the last one's temperature.

        Empty if there is nothing to predict. The teacher does not run on the rows of `train.eval_sets`, of which only
        the cross-entropy is reported. `until_stopped` yields the micro-batches until the ranks agree to stop.
        """
        temperature = value_at(self._config.distill.temperature, done - 1, self._total_steps)
        where, masks = (temperature, ranks.reduce_sum, ranks.device()), _masks(self._config)
        losses = {}
        student.eval()
        batches = self._batches(self._data, masks, for_teacher=teacher is not None)
        own = held_out_loss(student, teacher, until_stopped(batches), *where)
        if own is not None:
            losses[eval_key("")] = own.hard_loss
            if teacher is not None or self._config.teacher.path is None:
                losses["eval_soft_loss"] = own.soft_loss
            if own.shared_hard_loss is not None:
                losses["eval_shared_hard_loss"] = own.shared_hard_loss
                if self._measured is not None and self._measured.shared_mass is not None:
                    losses["teacher_shared_hard_loss"] = self._measured.hard_loss
                    losses["teacher_shared_mass"] = self._measured.shared_mass
        for name, each in self._sets.items():
            further = held_out_loss(student, None, until_stopped(self._batches(each, masks)), *where)
            if further is not None:
                losses[eval_key(name)] = further.hard_loss
        student.train()
        return losses if self._overlap is None or not losses else {**losses, **self._overlap.to_row()}

    def _batches(self, data: PreparedData, masks: DataConfig, *, for_teacher: bool = False) -> Iterator[Batch]:
        """This rank's micro-batches, on its device; every rank has the same number of them.

        `for_teacher`: with what a teacher with another vocabulary reads.
        """
        mine = validation_batches(
            data.validation,
            self._data.facts,
            masks,
            micro_batch_size=self._config.train.micro_batch_size,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            max_rows=self._config.train.eval_rows,
            teacher_tokens=self._other.tokens if self._other is not None and for_teacher else None,
        )
        return (batch.to(ranks.device()) for batch in mine)


def _masks(config: RunConfig) -> DataConfig:
    """How the student's evaluations mask."""
    return replace(config.data, mask_probability=config.train.eval_mask_probability or config.data.mask_probability)
