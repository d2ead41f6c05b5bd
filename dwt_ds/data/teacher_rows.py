"""A batch's rows in the tokens of a teacher that has a vocabulary of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dwt_ds.data.shared_vocabulary import SharedVocabulary
from dwt_ds.data.tensors import attention_mask, int32_arrays, int64, lengths_of


class TeacherRows(NamedTuple):
    """The rows of a batch as the teacher reads them: B rows of S_t columns, M aligned positions."""

    input_ids: Tensor
    """(B, S_t) int64, the words that the student must predict masked."""
    attention_mask: Tensor | None
    """(B, S_t) int64, 1 on real tokens; None where there is no padding."""
    positions: Tensor
    """(M,) int64: flat indices into B x S_t of the aligned tokens, ascending."""
    aligned: Tensor
    """(M,) int64, ascending: which of the batch's `positions` and `labels` (N,) these are."""

    def to(self, device: torch.device) -> TeacherRows:
        """The same on `device`."""
        return TeacherRows(*(None if each is None else each.to(device, non_blocking=True) for each in self))

    def __reduce__(self) -> tuple[Any, ...]:
        """As those of a batch, for loader processes."""
        lengths = lengths_of(self.input_ids, self.attention_mask)
        return _teacher_rows, int32_arrays(self.input_ids, lengths, self.positions, self.aligned)


def _teacher_rows(
    input_ids: np.ndarray, lengths: np.ndarray, positions: np.ndarray, aligned: np.ndarray
) -> TeacherRows:
    mask = attention_mask(lengths, input_ids.shape[1])
    return TeacherRows(int64(input_ids), mask, int64(positions), int64(aligned))


@dataclass(frozen=True)
class TeacherTokens:
    """Makes the teacher's rows from those of the student. Cheap to pickle; loader processes have one each."""

    shared: SharedVocabulary

    @classmethod
    def of(
        cls, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, longest_row: int
    ) -> TeacherTokens:
        """Between two tokenizers.

        Args:
            student: that made the rows.
            teacher: the teacher's.
            longest_row: tokens of the longest row that the teacher can read, special tokens included.

        Raises:
            ValueError: one line with the fix: no entry in common, a tokenizer that is not fast, a teacher without a
                mask token, or a student's tokenizer whose tokens do not give the text back.
        """
        raise NotImplementedError

    def rows(
        self, input_ids: np.ndarray, lengths: np.ndarray, positions: np.ndarray, starts_word: np.ndarray | None
    ) -> TeacherRows:
        """The teacher's rows of a micro-batch.

        Args:
            input_ids: (B, S) int64, the student's rows, not masked.
            lengths: (B,) int64, real tokens of each.
            positions: (N,) int64, flat indices into B x S of the labelled tokens, ascending.
            starts_word: (B, S) bool, the tokens that start a word, where the data folder says so.
        """
        raise NotImplementedError
