"""Measures how much of a data folder a teacher with another vocabulary can teach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.batches import validation_batches
from dwt_ds.data.prepared import PreparedData
from dwt_ds.data.teacher_rows import TeacherTokens

_ROWS = 256
_MICRO_BATCH_SIZE = 32
FEW_ALIGNED = 0.3
"""Below this share a run warns, since the soft loss sees so little."""


@dataclass(frozen=True)
class Overlap:
    """What the vocabularies of teacher and student have in common on a data folder."""

    entries: int
    """Entries that both vocabularies share."""
    aligned_share: float
    """Share of the labelled tokens that are whole words and one token of each."""
    teacher_tokens: float
    """The teacher's tokens per token of the student."""

    @classmethod
    def measure(cls, tokens: TeacherTokens, data: PreparedData, config: DataConfig) -> Overlap:
        """On training rows spread evenly over the folder, masked as validation rows are."""
        labels = aligned = ours = theirs = 0
        for batch in validation_batches(
            data.train,
            data.facts,
            config,
            micro_batch_size=_MICRO_BATCH_SIZE,
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

    def to_row(self) -> dict[str, Any]:
        """Its keys in metrics.jsonl."""
        return {
            "shared_entries": self.entries,
            "aligned_share": self.aligned_share,
            "teacher_tokens_per_token": self.teacher_tokens,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Overlap:
        """Out of a row of metrics.jsonl that has the keys of `to_row`."""
        return cls(row["shared_entries"], row["aligned_share"], row["teacher_tokens_per_token"])
