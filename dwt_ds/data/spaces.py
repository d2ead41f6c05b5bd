"""Guesses the spaces between tokens of a vocabulary that leaves them out, as BERT's does around punctuation.

The rules are those of written English and of scripts without spaces. They cannot always be right: "50 , 000" may be one
number or two.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import regex

_HAN = regex.compile(r"[\p{Han}\u3000-\u303f\uff00-\uffef]+")
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}\u30fc]+")
_BEFORE_NONE, _AFTER_NONE, _QUOTE, _APOSTROPHE, _WORD, _LETTER, _ENDING, _DIGITS, _POINT, _IS_KANA = (
    1 << bit for bit in range(10)
)
_ENDINGS = {"s", "t", "d", "m", "re", "ve", "ll"}
_BOTH, _LEFT, _RIGHT, _NEITHER = set("-/\\@_‐‑–—~"), set("%°"), set("#§¶"), set("&*")


class SpaceRules:
    """The rules for the tokens of one vocabulary, given their texts in UTF-8, without prefixes that mark words."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._is = np.array([_class_of(text.decode(errors="replace")) for text in texts], dtype=np.int64)
        self.usually_after_space = self._is & (_BEFORE_NONE | _QUOTE | _APOSTROPHE | _IS_KANA) == 0
        """(V,) bool: tokens with a space before them, unless the token before them takes none after it."""

    def spaces_before(self, ids: np.ndarray, between: np.ndarray, joined: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """(N,) bool: which of the tokens have a space before them.

        Args:
            ids: (N,) int64, tokens of concatenated texts.
            between: (N,) bool: tokens between texts, which belong to none.
            joined: (N,) bool: tokens that continue the word of the token before them.
            begins: (N,) bool: those of `between` before the beginning of a text.
        """
        classes = self._is[ids]

        def has(what: int) -> np.ndarray:
            return (classes & what) != 0

        word, ending = has(_WORD), has(_ENDING) & ~_after(joined)
        elided = _before(word) & _after(ending) | _before(has(_LETTER) & ~joined) & _after(word)
        elided &= has(_APOSTROPHE)
        none_before, none_after = has(_BEFORE_NONE) | elided, has(_AFTER_NONE) | elided
        for quotes in (has(_QUOTE), has(_APOSTROPHE) & ~none_before):
            opens = quotes & (_count(quotes, between) % 2 == 1)
            none_after |= opens
            none_before |= quotes & ~opens
        digits = has(_DIGITS)
        in_number = digits & _before(has(_POINT) & _before(digits))
        glued = none_before | _before(none_after) | in_number
        return ~(glued | joined | between | _before(begins))


def _class_of(text: str) -> int:
    if not text:
        return 0
    if _HAN.fullmatch(text):
        return _BEFORE_NONE | _AFTER_NONE
    if _KANA.fullmatch(text):
        return _IS_KANA
    if text.isalnum():
        return (
            _WORD
            | _LETTER * (len(text) == 1 and text.isalpha())
            | _ENDING * (text.lower() in _ENDINGS)
            | _DIGITS * text.isdecimal()
        )
    if len(text) > 1:  # a word with marks, or several symbols
        return _WORD if any(character.isalnum() for character in text) else _class_of(text[0])
    if text in "\"'’":
        return {'"': _QUOTE, "'": _APOSTROPHE, "’": _APOSTROPHE | _BEFORE_NONE}[text]
    category = unicodedata.category(text)
    if text in _BOTH:
        return _BEFORE_NONE | _AFTER_NONE
    if text in _RIGHT or category in ("Ps", "Pi", "Sc"):
        return _AFTER_NONE
    if text in _LEFT or (category in ("Pe", "Pf", "Po") and text not in _NEITHER):
        return _BEFORE_NONE | _POINT * (text in ".,:")
    return 0


def _before(array: np.ndarray) -> np.ndarray:
    """(N,) bool: `array` (N,), shifted so that each token has the value of the token before it."""
    return np.concatenate([[False], array[:-1]])


def _after(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array[1:], [False]])


def _count(array: np.ndarray, between: np.ndarray) -> np.ndarray:
    """(N,) int64: number of true values in a token's text, up to and including the token."""
    total = np.cumsum(array)
    return total - np.maximum.accumulate(np.where(between, total, 0))
