"""Packs tokens of sentences into rows, or makes a row of each sentence.

A token and the bit that says whether it starts a word are moved together, as the number 2 x id + bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from dwt_ds.prepare.tokens import Tokens


@dataclass(frozen=True)
class RowSettings:
    """Everything that the rows of a chunk depend on besides its text."""

    tokenizer_file: str
    """Path of a tokenizer.json."""
    cls_id: int
    sep_id: int
    vocab_size: int
    seq_len: int
    one_sentence_per_row: bool
    join_documents: bool
    every: int
    min_chars: int
    max_chars: int
    seed: int
    drop_long: bool = False
    """Whether sentences longer than max_chars are dropped; they are cut otherwise."""


@dataclass(frozen=True)
class Rows:
    """Rows, concatenated."""

    tokens: np.ndarray
    """Token ids of all rows, 1-d, uint16 or uint32."""
    starts_word: np.ndarray
    """bool, 1-d: tokens that start a word; special tokens do."""
    lengths: np.ndarray
    """int32 (rows,): tokens of each row, [CLS] and [SEP] included."""


def rows_of_sentences(tokens: Tokens, documents: np.ndarray, chosen: np.ndarray, settings: RowSettings) -> Rows:
    """Rows of the `chosen` sentences (indices, ascending): packed, or one of each, cut to `seq_len`.

    `tokens` are those of all sentences, `documents` (sentences,) the number of each sentence's document, ascending.
    """
    sentences = np.split(_with_bit(tokens.ids, tokens.starts_word), np.cumsum(tokens.lengths)[:-1])
    if settings.one_sentence_per_row:
        cut = [sentences[i][: settings.seq_len - 2] for i in chosen.tolist() if len(sentences[i])]
        return _framed(cut, [len(sentence) for sentence in cut], settings)
    by_document = groupby(chosen.tolist(), documents.__getitem__)
    return _packed_rows([np.concatenate([sentences[i] for i in numbers]) for _, numbers in by_document], settings)


def _packed_rows(documents: Sequence[np.ndarray], settings: RowSettings) -> Rows:
    """Fill rows of `seq_len` tokens with the running text of `documents` (tokens with bits, 1-d each).

    A row is [CLS] text [SEP]. Text that does not fit continues in the next row, so only the last row is short. Joined
    documents share rows, with a [SEP] between them (Liu et al. 2019, section 4.2, "full-sentences"); otherwise each
    document begins a row, and its last row is short.
    """
    capacity = settings.seq_len - 2
    separator = _special(settings.sep_id)
    pieces: list[np.ndarray] = []
    contents: list[int] = []
    fill = 0  # text tokens in the current row; 0 if there is none
    for document in documents:
        if len(document) == 0:
            continue
        room = capacity - fill
        if fill and settings.join_documents and room >= 2:
            pieces.append(separator)
            fill += 1
        elif fill:
            contents.append(fill)
            fill = 0
        pieces.append(document)
        full, fill = divmod(fill + len(document), capacity)
        contents.extend([capacity] * full)
    if fill:
        contents.append(fill)
    return _framed(pieces, contents, settings)


def _framed(pieces: list[np.ndarray], contents: list[int], settings: RowSettings) -> Rows:
    """Rows of `contents` text tokens each, with [CLS] before and [SEP] after each; `pieces` is their text."""
    text = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    lengths = np.array(contents, dtype=np.int64) + 2
    ends = np.cumsum(lengths)
    tokens = np.empty(int(lengths.sum()), dtype=np.int64)
    tokens[ends - lengths] = _special(settings.cls_id)
    tokens[ends - 1] = _special(settings.sep_id)
    row_of_token = np.repeat(np.arange(len(lengths)), lengths - 2)
    tokens[np.arange(len(text)) + 2 * row_of_token + 1] = text
    dtype = np.uint16 if settings.vocab_size <= 1 << 16 else np.uint32
    return Rows((tokens >> 1).astype(dtype), tokens & 1 == 1, lengths.astype(np.int32))


def _with_bit(ids: np.ndarray, starts_word: np.ndarray) -> np.ndarray:
    return 2 * ids + starts_word


def _special(index: int) -> np.ndarray:
    return _with_bit(np.array([index]), np.array([True]))
