"""Finds where words start, also in scripts without spaces.

jieba segments Chinese and PyThaiNLP Thai, both with dictionaries; the extra `words` installs them (100 MB, so they are
optional). Without them, and in Japanese, Lao, Khmer, Burmese and Tibetan, each character with its marks counts as a
word. `segmenters` names the one in use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from itertools import accumulate

import regex

_LIBRARIES = {"Chinese": "jieba", "Thai": "pythainlp"}
_BY_CHARACTER = "by character"
_OTHERS = r"[\p{Hiragana}\p{Katakana}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\u30fc]"
_WITHOUT_SPACES = rf"[\p{{Han}}\p{{Thai}}{_OTHERS}]"
_IN_WORD = rf"[[\p{{Letter}}\p{{Mark}}\p{{Number}}]--{_WITHOUT_SPACES}]"
# Tried in this order: runs of a script without spaces; words of other scripts, which end where such a run begins
# (iPhone手机) and whose letters may have a joiner or non-joiner between them; symbols, with an emoji of several
# characters as one.
_RUN = regex.compile(
    r"(?P<Chinese>(?:\p{Han}\p{Mark}*)+)"
    r"|(?P<Thai>\p{Thai}+)"
    rf"|(?P<unspaced>(?:{_OTHERS}\p{{Mark}}*)+)"
    rf"|{_IN_WORD}[{_IN_WORD}\u200c\u200d]*(?:['\u2019][{_IN_WORD}--\p{{Number}}]+)*"
    r"|(?!\s)\X",
    regex.VERSION1,
)
_UNSPACED = regex.compile(_WITHOUT_SPACES, regex.VERSION1)
_CHARACTER = regex.compile(r"\X")
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")


def word_starts(text: str) -> list[int]:
    """Offsets of the first character of each word of `text`, ascending.

    A word is a run of letters and digits, or what the segmenter of its script finds; any other symbol is a word of its
    own. In a text with kana, Han characters are Japanese, and each is a word.
    """
    starts: list[int] = []
    japanese = not text.isascii() and bool(_KANA.search(text))
    for match in _RUN.finditer(text):
        script = match.lastgroup
        if script is None:
            starts.append(match.start())
        else:
            segment = _characters if script == "unspaced" or japanese and script == "Chinese" else _segmenter(script)
            starts.extend(match.start() + offset for offset in segment(match[0]))
    return starts


def unspaced_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) offsets of the runs in scripts without spaces."""
    if text.isascii() or not _UNSPACED.search(text):
        return []
    return [match.span() for match in _RUN.finditer(text) if match.lastgroup]


def segmenters() -> dict[str, str]:
    """Script -> the library that segments it, with its version, or "by character". Rows depend on them."""
    return {
        script: f"{library} {metadata.version(library)}" if find_spec(library) else _BY_CHARACTER
        for script, library in _LIBRARIES.items()
    }


def _characters(text: str) -> Iterator[int]:
    return (match.start() for match in _CHARACTER.finditer(text))


@lru_cache(maxsize=2)
def _segmenter(script: str) -> Callable[[str], Iterator[int]]:
    """A function from a run of `script` to the offsets of its words."""
    if not find_spec(_LIBRARIES[script]):
        return _characters
    if script == "Chinese":
        import jieba

        jieba.setLogLevel(logging.WARNING)
        # The hidden Markov model would join characters that no entry of the dictionary joins.
        return lambda text: (start for _, start, _ in jieba.tokenize(text, HMM=False))

    from pythainlp.tokenize import word_tokenize

    return lambda text: accumulate(map(len, word_tokenize(text, keep_whitespace=True)[:-1]), initial=0)
