"""The rows of a batch in the tokens of a teacher with another vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dwt_ds.data.pieces import Pieces, common_words, cut_rows, replaced
from dwt_ds.data.row_texts import RowReader, RowTexts
from dwt_ds.data.shared_vocabulary import SharedVocabulary
from dwt_ds.data.tensors import as_bytes, attention_mask, int64, is_real
from dwt_ds.data.text_tokenizer import Form, all_is_text, by_character, bytes_of_fallback, load_form
from dwt_ds.data.token_texts import TokenTexts
from dwt_ds.data.tokenizer import vocabulary_size


class CommonWords(NamedTuple):
    """The words that rows of the student and of the teacher both have, numbered from 1; 0 stands for none."""

    ours: Tensor
    """(B, S) int64, the word of each token of the student."""
    theirs: Tensor
    """(B, S_t) int64, the word of each token of the teacher."""
    total: int
    """How many words there are."""

    def __reduce__(self) -> tuple[Any, ...]:
        return as_bytes(self)


class TeacherRows(NamedTuple):
    """The rows of a batch as the teacher reads them: B rows of S_t columns, M aligned positions."""

    input_ids: Tensor
    """(B, S_t) int64, with the words that the student must predict masked."""
    attention_mask: Tensor | None
    """(B, S_t) int64, 1 on real tokens; None if there is no padding."""
    positions: Tensor
    """(M,) int64: flat indices into B x S_t of the aligned tokens, ascending."""
    aligned: Tensor
    """(M,) int64, ascending: which of the batch's `positions` and `labels` (N,) these are."""
    words: CommonWords

    def __reduce__(self) -> tuple[Any, ...]:
        return as_bytes(self)


@dataclass(frozen=True)
class TeacherTokens:
    """Makes the teacher's rows from those of the student, by tokenizing the text of each row again.

    The text of a row is tokenized as a whole, not word by word, so the tokens are the teacher's own in any script. The
    tokenizer caches words, so this costs little (`benchmarks/teacher_rows.py`).
    """

    shared: SharedVocabulary
    _reader: RowReader
    _form: Form
    """The teacher's tokenizer."""
    _byte: np.ndarray | None
    """(V_teacher,) int64: the bytes of byte fallback; None without byte fallback."""
    _longest_row: int | None
    _mask_id: int
    _pad_id: int
    _mask_id_of_student: int
    _before: list[int]
    _after: list[int]
    """What the teacher's tokenizer puts before and after a text."""
    _for_special: dict[int, list[int]]
    """The teacher's tokens for the student's special tokens inside a row."""

    @classmethod
    def of(
        cls, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, longest_row: int | None
    ) -> TeacherTokens:
        """Between two tokenizers, of which the student's made the rows.

        `longest_row` is the most tokens in a row of the teacher, special tokens included; None: no limit.

        Raises ValueError, in one line with the fix, for vocabularies without a common entry, a tokenizer that is not
        fast, a teacher without a mask token, or a student's tokenizer whose tokens do not give the text back.
        """
        shared = SharedVocabulary.of(student, teacher)
        if teacher.mask_token_id is None:
            raise ValueError(
                "teacher.vocabulary=shared: the teacher's tokenizer has no mask token, so no word can be hidden from "
                "it; give a masked language model"
            )
        form = all_is_text(teacher.backend_tokenizer)
        byte = None
        if form["model"].get("byte_fallback"):
            vocabulary = teacher.get_vocab()
            byte = np.full(vocabulary_size(teacher), -1, dtype=np.int64)
            byte[list(vocabulary.values())] = bytes_of_fallback(list(vocabulary))
        before, after = _frame(teacher)
        unknown = teacher.mask_token_id if teacher.unk_token_id is None else teacher.unk_token_id
        for_special = {} if student.unk_token_id is None else {student.unk_token_id: [unknown]}
        if teacher.sep_token_id is not None:
            for_special[student.sep_token_id] = [teacher.sep_token_id]
        return cls(
            shared,
            RowReader(TokenTexts.of(student, "the data folder's"), student.unk_token_id),
            form,
            byte,
            longest_row,
            teacher.mask_token_id,
            teacher.pad_token_id or 0,
            student.mask_token_id,
            before,
            after,
            for_special,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherTokens, tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_form(self._form)

    def rows(
        self,
        input_ids: np.ndarray,
        lengths: np.ndarray,
        positions: np.ndarray,
        shown: np.ndarray,
        starts_word: np.ndarray,
        *,
        continued: bool = False,
    ) -> TeacherRows:
        """The teacher's rows of a micro-batch.

        The teacher sees a word as the student does: masked as a whole if a token of it is masked; as it is if its
        labelled tokens are shown as they are; otherwise as the teacher's entry for the random token in its place. A
        token is aligned if it is a whole word and also one token of the teacher, and the two are a shared entry.

        Args:
            input_ids: (B, S) int64, the student's rows, not masked.
            lengths: (B,) int64, real tokens of each.
            positions: (N,) int64, flat indices into B x S of the labelled tokens, ascending.
            shown: (N,) int64, what the student sees there.
            starts_word: (B, S) bool, the tokens that start a word.
            continued: the rows continue a text that began before them, as most packed ones do. A word at their
                beginning then has a space before it, which is part of it in byte-level BPE.
        """
        width = input_ids.shape[1]
        real = is_real(lengths, width)
        ids, starts = input_ids[real], starts_word[real]
        first = np.cumsum(lengths) - lengths
        labelled = first[positions // width] + positions % width
        texts = self._reader.read(ids, continued=continued)
        characters = len(texts.text)
        word_at = np.cumsum(np.bincount(texts.start[starts], minlength=characters + 1))

        pieces = self._pieces(ids, first, texts)
        if self._longest_row is not None:
            pieces = cut_rows(pieces, word_at, self._longest_row, len(self._before), len(self._after))
        word = np.cumsum(starts)
        is_masked = shown == self._mask_id_of_student
        is_random = ~is_masked & (shown != ids[labelled])
        seen = pieces.ids
        # Masked words last: a piece may overlap one of each.
        for chosen, instead in (
            (is_random, self._teacher_entries(shown[is_random])),
            (is_masked, np.full(is_masked.sum(), self._mask_id)),
        ):
            of_word = np.full(word[-1] + 1, -1, dtype=np.int64)
            of_word[word[labelled[chosen]]] = instead
            seen = replaced(seen, pieces, of_word[word], texts)

        is_whole = starts[labelled] & np.append(starts, True)[labelled + 1]
        solid = _solid(texts.text)
        piece, aligned = self._aligned(ids, labelled, is_whole, texts, pieces, solid)

        lengths_there = np.bincount(pieces.row, minlength=len(lengths))
        first_there = np.cumsum(lengths_there) - lengths_there
        rows = np.full((len(lengths), int(lengths_there.max(initial=0))), self._pad_id, dtype=np.int64)
        real_there = is_real(lengths_there, rows.shape[1])
        rows[real_there] = seen
        row = pieces.row[piece]

        ours, theirs = np.zeros_like(input_ids), np.zeros_like(rows)
        begins = solid[pieces.start]
        ours[real], theirs[real_there], total = common_words(
            np.where(texts.is_special, 0, word_at[texts.start]), np.where(begins < pieces.end, word_at[begins], 0)
        )
        positions_there = row * rows.shape[1] + piece - first_there[row]
        mask, words = attention_mask(lengths_there, rows.shape[1]), CommonWords(int64(ours), int64(theirs), total)
        return TeacherRows(int64(rows), mask, int64(positions_there), int64(aligned), words)

    def _teacher_entries(self, ids: np.ndarray) -> np.ndarray:
        """(N,) int64: for tokens (N,) of the student the shared entry; for one that is not shared, any."""
        index = self.shared.shared_index_of_student[ids]
        return self.shared.teacher_ids[np.where(index >= 0, index, ids % len(self.shared.teacher_ids))]

    def _pieces(self, ids: np.ndarray, first: np.ndarray, texts: RowTexts) -> Pieces:
        """ids: (N,) int64, the student's tokens of rows that begin at `first` (B,)."""
        begins, ends = texts.start[texts.segments[:, 0]], texts.end[texts.segments[:, 1] - 1]
        segments = [texts.text[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        encodings = self._tokenizer.encode_batch(segments, add_special_tokens=False)
        firsts, lasts = set(first.tolist()), {*(first - 1).tolist(), len(ids) - 1}
        # (index of the student's token where they begin, whether they are text, teacher's tokens)
        runs = [(token, True, each.ids) for token, each in zip(texts.segments[:, 0].tolist(), encodings, strict=True)]
        for token in np.flatnonzero(texts.is_special).tolist():
            for_special = self._for_special.get(int(ids[token]), [])
            run = self._before if token in firsts else self._after if token in lasts else for_special
            runs.append((token, False, run))
        runs.sort(key=itemgetter(0))
        counts, of_text = np.array([len(run) for *_, run in runs]), np.array([text for _, text, _ in runs])
        is_text = np.repeat(of_text, counts)
        row = np.repeat(np.searchsorted(first, [token for token, *_ in runs], side="right") - 1, counts)
        there = np.fromiter(chain.from_iterable(run for *_, run in runs), dtype=np.int64, count=len(row))

        pairs = chain.from_iterable(each.offsets for each in encodings)
        offsets = np.fromiter(chain.from_iterable(pairs), dtype=np.int64).reshape(-1, 2)
        start, end = (offsets + np.repeat(begins, counts[of_text])[:, None]).T
        if self._byte is not None:
            start, end = by_character(start, end, self._byte[there[is_text]])
        pieces = Pieces(there, row, *(np.full(len(row), len(texts.text), dtype=np.int64) for _ in range(2)))
        pieces.start[is_text], pieces.end[is_text] = start, end
        return pieces

    def _aligned(
        self,
        ids: np.ndarray,
        labelled: np.ndarray,
        is_whole: np.ndarray,
        texts: RowTexts,
        pieces: Pieces,
        solid: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """((M,) piece, (M,) index into `labelled`) of the aligned tokens, both int64, ascending.

        `ids` (N,) are the student's tokens, `labelled` (N',) says which of them have a label, and `is_whole` (N',) bool
        which of these are words. `solid` is what `_solid` says of the text.
        """
        piece_at = np.full(len(solid), -1, dtype=np.int64)
        start = solid[pieces.start]
        solid_pieces = np.flatnonzero(start < pieces.end)
        piece_at[start[solid_pieces]] = solid_pieces
        piece = piece_at[solid[texts.start[labelled]]]
        shared = self.shared.shared_index_of_student[ids[labelled]]
        is_aligned = is_whole & (piece >= 0) & (shared >= 0) & (pieces.ids[piece] == self.shared.teacher_ids[shared])
        return piece[is_aligned], np.flatnonzero(is_aligned)


def _solid(text: str) -> np.ndarray:
    """(T + 1,) int64: for each offset, the first character from there on that is not a space; T for none."""
    characters = len(text)
    is_space = np.frombuffer(text.encode("utf-32-le"), dtype="<u4") == ord(" ")
    solid = np.where(is_space, characters, np.arange(characters))
    return np.append(np.minimum.accumulate(solid[::-1])[::-1], characters)


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text: its mask token, which is in any vocabulary."""
    ids = tokenizer(tokenizer.mask_token)["input_ids"]
    text = ids.index(tokenizer.mask_token_id)
    return ids[:text], ids[text + 1 :]
