"""Lines of text into sentences.

The splitter is syntok (Leitner's rules for European languages), chosen among five on a hand-labelled sample of
Wikipedia and novels; docs/data.md has the figures.
"""

from __future__ import annotations

import re

from syntok import segmenter

# A line without a sentence end before its last characters is one sentence. Corpora with a sentence a line consist
# mostly of such lines, and are split three times faster by this check. The characters are syntok's terminals.
_INNER_END = re.compile(r"[.!?;\u2026\u203c\u203d\u2047-\u2049\u3002\ufe52\ufe57\uff01\uff0e\uff1f\uff61](?!\W*$)")


def split_sentences(line: str) -> list[str]:
    """The sentences of one line (a paragraph or a heading), stripped, none empty, in order.

    A semicolon does not end a sentence here; for syntok it does before a capital letter or a quote.
    """
    if not _INNER_END.search(line):
        return [line] if line else []
    sentences: list[str] = []
    start = 0
    for end in _ends(line):
        if line[end - 1] != ";" or end == len(line):
            sentences.append(line[start:end].strip())
            start = end
    return [sentence for sentence in sentences if sentence]


def _ends(line: str) -> list[int]:
    """Offsets just after each sentence; the last is the line's length."""
    ends = []
    for paragraph in segmenter.analyze(line):
        for sentence in paragraph:
            last = sentence[-1]
            ends.append(last.offset + len(last.value))
    return [*ends[:-1], len(line)]
