"""Entries that two vocabularies have in common: what a teacher with another tokenizer can teach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SharedVocabulary:
    """Pairs of entries, one of each vocabulary, that stand for the same text in the same place of a word."""

    student_ids: np.ndarray
    """(E,) int64, ascending."""
    teacher_ids: np.ndarray
    """(E,) int64: entry k of the teacher is entry k of the student."""
    shared_index_of_student: np.ndarray
    """(V_student,) int64: k for student_ids[k], -1 for entries that the teacher does not have."""
    share_of_student: float
    """E as a share of the student's ordinary entries (special tokens left out)."""
    share_of_teacher: float

    @classmethod
    def of(cls, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> SharedVocabulary:
        """Raises ValueError, of one line, where no entry is shared."""
        raise NotImplementedError
