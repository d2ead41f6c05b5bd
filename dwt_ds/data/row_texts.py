"""Turns rows of tokens back into text, with the place of each token in it."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwt_ds.data.spaces import SpaceRules
from dwt_ds.data.token_texts import TokenTexts

# Put between segments, so that bytes at the end of one and the beginning of the next do not make a character.
_BETWEEN = b"\0"
# For bytes that are not whole characters: a row may begin or end inside a character.
_PARTS_AS_SPACES = "dwt_ds.parts_as_spaces"


@dataclass(frozen=True)
class RowTexts:
    """The text of N tokens of some rows, in segments separated by special tokens."""

    text: str
    """Of all segments, T characters."""
    is_special: np.ndarray
    """(N,) bool: tokens without text."""
    start: np.ndarray
    """(N,) int64: first character of each token; special tokens have one that is in no segment."""
    end: np.ndarray
    """(N,) int64: end of each token."""
    segments: np.ndarray
    """(R, 2) int64: first token and end of each segment, in order; none is empty."""


class RowReader:
    """Turns rows of tokens back into their text. The unknown token, if any, does not begin a new one."""

    def __init__(self, texts: TokenTexts, unknown_id: int | None) -> None:
        self._unknown_id = -1 if unknown_id is None else unknown_id
        filled = [text or _BETWEEN for text in texts.texts]
        self._is_special = np.array([not text for text in texts.texts])
        self._joins_left, self._joins_right = texts.joins_left, texts.joins_right
        self._rules = None if texts.joins_left.all() else SpaceRules(texts.texts)
        # With a space before it: V further on.
        self._texts = [*filled, *(b" " + text for text in filled)]
        self._lengths = np.array([len(text) for text in self._texts], dtype=np.int64)

    def read(self, ids: np.ndarray, *, continued: bool = False) -> RowTexts:
        """The text of some rows.

        Args:
            ids: (N,) int64, concatenated rows, each between special tokens.
            continued: the rows continue a text that began before them, so that a word at their beginning has a space
                before it.
        """
        special = self._is_special[ids]
        segments = np.flatnonzero(np.diff(special, prepend=True, append=True)).reshape(-1, 2)
        chosen = ids
        if self._rules is not None:
            parts_texts = special & (ids != self._unknown_id)
            joined = self._joins_left[ids]
            joined[1:] |= self._joins_right[ids[:-1]] & ~special[:-1]
            # A row's first token is special, as the token before it is.
            begins = parts_texts & ~np.concatenate([[True], special[:-1]]) if continued else parts_texts
            spaced = self._rules.spaces_before(ids, parts_texts, joined, begins)
            chosen = ids + len(self._joins_left) * spaced
        lengths = self._lengths[chosen]
        raw = b"".join([self._texts[index] for index in chosen.tolist()])
        begins = np.concatenate([[0], np.cumsum(lengths)])
        text = raw.decode(errors=_PARTS_AS_SPACES)
        first_bytes = np.frombuffer(text.encode(), dtype=np.uint8) & 0xC0 != 0x80
        character = np.cumsum(first_bytes) - 1
        return RowTexts(text, special, character[begins[:-1]], character[begins[1:] - 1] + 1, segments)


def _as_spaces(error: Any) -> tuple[str, int]:
    return " " * (error.end - error.start), error.end


codecs.register_error(_PARTS_AS_SPACES, _as_spaces)
