"""Finds the entries that two vocabularies share, which are what a teacher with another tokenizer can teach.

Two entries are shared if they stand for exactly the same text, both with a space before it or both without. `the` and
`##ing` of WordPiece match `Ġthe` and `ing` of byte-level BPE, and `▁the` and `ing` of SentencePiece. An entry of a
vocabulary without spaces stands for the text as it is usually written: WordPiece's comma, and each Chinese character,
without a space before it. Capitals and accents count: `The` does not match `the` of an uncased vocabulary, since two
entries would then have one partner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dwt_ds.data.spaces import SpaceRules
from dwt_ds.data.token_texts import TokenTexts

_SPACE = b" "


@dataclass(frozen=True)
class SharedVocabulary:
    """Pairs of entries, one of each vocabulary. No entry has two partners; special tokens have none."""

    student_ids: np.ndarray
    """(E,) int64, ascending."""
    teacher_ids: np.ndarray
    """(E,) int64: entry k of the teacher is entry k of the student."""
    shared_index_of_student: np.ndarray
    """(V_student,) int64: k for student_ids[k], -1 for entries that the teacher does not have."""
    share_of_student: float
    """E as a share of the student's entries without special and added tokens."""
    share_of_teacher: float

    @classmethod
    def of(cls, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> SharedVocabulary:
        """Raises ValueError, in one line, if no entry is shared or the text of a tokenizer's entries is not known."""
        texts = TokenTexts.of(student, "the data folder's"), TokenTexts.of(teacher, "the teacher's")
        ours, theirs = map(_entries, texts)
        pairs = sorted((index, theirs[entry]) for entry, index in ours.items() if entry in theirs)
        if not pairs:
            raise ValueError(
                "teacher.vocabulary=shared: the teacher's vocabulary and that of the data folder have no entry in "
                "common; choose a teacher for the same language"
            )
        student_ids, teacher_ids = np.array(pairs, dtype=np.int64).T
        index_of = np.full(len(texts[0].texts), -1, dtype=np.int64)
        index_of[student_ids] = np.arange(len(student_ids))
        shares = (len(pairs) / max(int(side.is_ordinary.sum()), 1) for side in texts)
        return cls(student_ids.copy(), teacher_ids.copy(), index_of, *shares)


def _entries(texts: TokenTexts) -> dict[bytes, int]:
    """Text (with the space before it) -> id, of the entries that are whole characters and not only spaces."""
    ids = [index for index in np.flatnonzero(texts.is_ordinary).tolist() if _is_text(texts.texts[index])]
    if texts.joins_left.all():
        return {texts.texts[index]: index for index in reversed(ids)}
    spaces = SpaceRules(texts.texts)
    found: dict[bytes, int] = {}
    # Pieces that continue a word come last: "," wins over "##,", which no text contains.
    for index in sorted(ids, key=lambda index: bool(texts.joins_left[index])):
        # Left out: entries that need the rest of their word ("th" of "th" + "e</w>") may begin a word or not.
        if not texts.joins_right[index]:
            after_space = not texts.joins_left[index] and spaces.usually_after_space[index]
            found.setdefault((_SPACE if after_space else b"") + texts.texts[index], index)
    return found


def _is_text(text: bytes) -> bool:
    try:
        return bool(text.decode().strip())
    except UnicodeDecodeError:
        return False
