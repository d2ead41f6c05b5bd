"""How much a teacher with a vocabulary of its own can teach of a data folder, in figures."""

from __future__ import annotations

from dataclasses import dataclass

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.batches import validation_batches
from dwt_ds.data.prepared import PreparedData
from dwt_ds.data.teacher_rows import TeacherTokens

_ROWS = 256
_MICRO_BATCH_SIZE = 32
FEW_ALIGNED = 0.3
"""Below this share the soft loss sees so little that a run warns."""


@dataclass(frozen=True)
class Overlap:
    """What teacher and student have in common."""

    entries: int
    """Of both vocabularies."""
    aligned_share: float
    """Of the labelled tokens: whole words that are one token of each."""
    teacher_tokens: float
    """The teacher's tokens for one of the student's."""

    @classmethod
    def measure(cls, tokens: TeacherTokens, data: PreparedData, config: DataConfig) -> Overlap:
        """On training rows spread evenly over the folder, masked as validation rows are.

        Args:
            tokens: of the teacher.
            data: the folder.
            config: how tokens are masked.
        """
        labels = aligned = ours = theirs = 0
        for batch in validation_batches(
            data.train,
            data.facts,
            config,
            micro_batch_size=_MICRO_BATCH_SIZE,
            rank=0,
            world_size=1,
            max_rows=_ROWS,
            teacher_tokens=tokens,
        ):
            rows = batch.teacher
            assert rows is not None  # there are teacher_tokens
            labels += len(batch.labels)
            aligned += len(rows.aligned)
            ours += batch.token_count
            theirs += rows.input_ids.numel() if rows.attention_mask is None else int(rows.attention_mask.sum())
        return cls(len(tokens.shared.student_ids), aligned / max(labels, 1), theirs / max(ours, 1))
