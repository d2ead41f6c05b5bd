"""Token ids of sentences into rows with [CLS] and [SEP]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Rows one after the other."""

    tokens: np.ndarray
    """Token ids of all rows, 1-d."""
    lengths: np.ndarray
    """int32 (rows,): tokens of each row, [CLS] and [SEP] included."""


def pack(documents: Sequence[np.ndarray], *, seq_len: int, cls_id: int, sep_id: int, join_documents: bool) -> Rows:
    """Fill rows of `seq_len` tokens with the running text of `documents` (token ids, 1-d each).

    A row is [CLS] text [SEP]; text that does not fit goes on in the next row, so only a last row is short. Joined
    documents share rows, with a [SEP] between them (Liu et al. 2019, section 4.2, "full-sentences"); otherwise each
    document starts a row, and its last one stays short.
    """
    capacity = seq_len - 2
    separator = np.array([sep_id])
    pieces: list[np.ndarray] = []
    contents: list[int] = []
    fill = 0  # text tokens in the row under way; 0 where none is
    for document in documents:
        if len(document) == 0:
            continue
        room = capacity - fill
        if fill and join_documents and room >= 2:
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
    text = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    return _framed(text, np.array(contents, dtype=np.int64), cls_id, sep_id)


def one_sentence_rows(sentences: Sequence[np.ndarray], *, seq_len: int, cls_id: int, sep_id: int) -> Rows:
    """A row for each sentence (token ids), cut to `seq_len`."""
    cut = [sentence[: seq_len - 2] for sentence in sentences if len(sentence)]
    text = np.concatenate(cut) if cut else np.zeros(0, dtype=np.int64)
    return _framed(text, np.array([len(sentence) for sentence in cut], dtype=np.int64), cls_id, sep_id)


def _framed(text: np.ndarray, contents: np.ndarray, cls_id: int, sep_id: int) -> Rows:
    """Rows of `contents` (rows,) text tokens each, with [CLS] before and [SEP] after each."""
    lengths = contents + 2
    ends = np.cumsum(lengths)
    tokens = np.empty(int(lengths.sum()), dtype=text.dtype)
    tokens[ends - lengths] = cls_id
    tokens[ends - 1] = sep_id
    row_of_token = np.repeat(np.arange(len(contents)), contents)
    tokens[np.arange(len(text)) + 2 * row_of_token + 1] = text
    return Rows(tokens, lengths.astype(np.int32))
