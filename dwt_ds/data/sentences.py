"""Lines of text into sentences, and the filters on them."""

from __future__ import annotations

import sentencex

# The library's rules for abbreviations and quotes are by language; English ones are used for all text.
_LANGUAGE = "en"


def split_sentences(line: str) -> list[str]:
    """The sentences of one line (a paragraph or a heading), stripped, none empty, in order."""
    return [stripped for sentence in sentencex.segment(_LANGUAGE, line) if (stripped := sentence.strip())]
