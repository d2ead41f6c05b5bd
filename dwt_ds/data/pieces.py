"""The tokens of a teacher with another vocabulary, and the words that they are in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dwt_ds.data.row_texts import RowTexts


class Pieces(NamedTuple):
    """The teacher's tokens of some rows, concatenated."""

    ids: np.ndarray
    """(P,) int64, like all of these."""
    row: np.ndarray
    start: np.ndarray
    """First character; special tokens have the end of the text."""
    end: np.ndarray
    """The one after the last character."""


def cut_rows(pieces: Pieces, word_at: np.ndarray, longest: int, before: int, after: int) -> Pieces:
    """Cut rows of more than `longest` tokens where a word starts, or inside a word that is longer than a row.

    Each row has `before` special tokens before its text and `after` after it. `word_at` is (T + 1,) int64: the number
    of the word at each character.
    """
    lengths = np.bincount(pieces.row)
    if lengths.max(initial=0) <= longest:
        return pieces
    is_special = pieces.start == len(word_at) - 1
    starts = is_special.copy()
    starts[1:] |= is_special[:-1] | (word_at[pieces.start[1:]] > word_at[pieces.end[:-1] - 1])
    keep = np.ones(len(pieces.ids), dtype=bool)
    for row in np.flatnonzero(lengths > longest).tolist():
        first = int(lengths[:row].sum())
        text, end = first + before, first + int(lengths[row]) - after
        room = first + longest - after
        word_starts = np.flatnonzero(starts[text + 1 : room + 1])
        keep[text + 1 + word_starts[-1] if len(word_starts) else room : end] = False
    return Pieces(*(array[keep] for array in pieces))


def replaced(ids: np.ndarray, pieces: Pieces, instead: np.ndarray, texts: RowTexts) -> np.ndarray:
    """(P,) int64: `ids` (P,) of the pieces; where a piece overlaps a token of the student with an `instead`, that.

    `instead` (N,) int64 has an id for each token of the student, or -1; `texts` has the places of these tokens.
    """
    tokens = np.flatnonzero((instead >= 0) & ~texts.is_special)
    if not len(tokens):
        return ids
    first = np.searchsorted(texts.end[tokens], pieces.start, side="right")
    token = tokens[np.minimum(first, len(tokens) - 1)]
    overlaps = (first < len(tokens)) & (texts.start[token] < pieces.end)
    return np.where(overlaps, instead[token], ids)


def common_words(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The words of which both sides have tokens, numbered from 1; 0 stands for none.

    Args:
        ours: (N,) int64, the word of each token of the student, by any numbers above 0.
        theirs: (P,) int64, likewise of each piece of the teacher.

    Returns:
        The same in the new numbers, and how many words there are.
    """
    most = 1 + int(max(ours.max(initial=0), theirs.max(initial=0)))
    both = (np.bincount(ours, minlength=most) > 0) & (np.bincount(theirs, minlength=most) > 0)
    both[0] = False
    number = np.cumsum(both) * both
    return number[ours], number[theirs], int(both.sum())
