"""A run's teacher that has a vocabulary of its own: its tokenizer, and what it shares with the data's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dwt_ds.base.words import prefix_errors
from dwt_ds.config.schema import TeacherConfig
from dwt_ds.data.overlap import FEW_ALIGNED, Overlap
from dwt_ds.data.shared_vocabulary import SharedVocabulary
from dwt_ds.data.teacher_rows import TeacherTokens
from dwt_ds.data.tokenizer import load_tokenizer, tokenizer_sha256, vocabulary_size
from dwt_ds.models.build import longest_row
from dwt_ds.models.load import load_model_config
from dwt_ds.models.tokenizers import check_decoder_rows
from dwt_ds.prepare.case_and_accents import of_tokenizer

_ROLES = ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id")


@dataclass(frozen=True)
class OtherVocabulary:
    """The teacher's, where `teacher.vocabulary` is shared."""

    tokens: TeacherTokens
    longest_row: int | None
    """Tokens of the longest row that the teacher can read; None: any."""
    _student: PreTrainedTokenizerBase
    _teacher: PreTrainedTokenizerBase

    @classmethod
    def load(cls, teacher: TeacherConfig, student: PreTrainedTokenizerBase) -> OtherVocabulary | None:
        """None without a teacher, and for one with the data folder's vocabulary. `student` is the folder's tokenizer.

        Raises:
            ValueError, FileNotFoundError: one line: no model or tokenizer at the path, or one that cannot teach by
                shared entries (`TeacherTokens.of`).
        """
        if teacher.path is None or teacher.vocabulary == "same":
            return None
        with prefix_errors("teacher.path"):
            config = load_model_config(teacher.path, trust_remote_code=teacher.trust_remote_code)
            tokenizer, longest = load_tokenizer(teacher.path), longest_row(config)
        return cls(TeacherTokens.of(student, tokenizer, longest), longest, student, tokenizer)

    @property
    def shared(self) -> SharedVocabulary:
        return self.tokens.shared

    @property
    def size(self) -> int:
        """Tokens of the teacher's vocabulary."""
        return vocabulary_size(self._teacher)

    @property
    def tokenizer_sha256(self) -> str:
        return tokenizer_sha256(self._teacher)

    def lost(self) -> str:
        """What the rows no longer have and the teacher's tokenizer keeps: "capitals", "accents", both, or nothing."""
        ours, theirs = of_tokenizer(self._student), of_tokenizer(self._teacher)
        capitals = ours.lowercase and not theirs.lowercase
        accents = ours.strip_accents and not theirs.strip_accents
        return " and ".join(["capitals"] * capitals + ["accents"] * accents)

    def check_decoder(self, rows: int) -> None:
        """Refuse a teacher whose decoder has fewer rows than its tokenizer has tokens (ValueError)."""
        check_decoder_rows(self._teacher, rows)

    def entries_to_grow_from(self) -> Tensor:
        """(V_student,) int64: the teacher's entry for each of the student's, -1 for none; special tokens by role."""
        entries = torch.full((len(self.shared.shared_index_of_student),), -1, dtype=torch.int64)
        entries[torch.from_numpy(self.shared.student_ids)] = torch.from_numpy(self.shared.teacher_ids)
        for role in _ROLES:
            ours, theirs = getattr(self._student, role), getattr(self._teacher, role)
            if ours is not None and theirs is not None:
                entries[ours] = theirs
        return entries


def overlap_lines(other: OtherVocabulary, overlap: Overlap) -> Iterator[str]:
    """What is shared, for people; a warning where it is little, or where the teacher reads unusual text."""
    shared = other.shared
    yield (
        f"shared vocabulary: {overlap.entries:,} entries ({shared.share_of_student:.0%} of the student's, "
        f"{shared.share_of_teacher:.0%} of the teacher's); {overlap.aligned_share:.0%} of the labelled tokens aligned; "
        f"{overlap.teacher_tokens:.2f} of the teacher's tokens for one of the student's"
    )
    if overlap.aligned_share < FEW_ALIGNED:
        yield (
            f"warning: only {overlap.aligned_share:.0%} of the labelled tokens are aligned with one of the teacher's, "
            "and the soft loss sees no others; a teacher whose vocabulary is closer to the data's would teach more"
        )
    if lost := other.lost():
        yield (
            f"warning: the rows have no {lost}, which the teacher's tokenizer keeps, so it reads text unlike what it "
            "was trained on; take a teacher without them, or prepare the data with a tokenizer that keeps them"
        )
