"""Splits lines of any script into sentences, as offsets into the line.

syntok (Leitner's rules) splits European languages; it was the best of five libraries on a hand-labelled sample of
Wikipedia and novels. Other scripts have sentence marks of their own (Unicode's property Sentence_Terminal), which
always end a sentence, unlike a full stop. Thai and its neighbours have no such mark: their text is cut at spaces.
docs/data.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator

import regex
from syntok import segmenter

# syntok's terminals. A line without one before its last word character is one sentence. This check makes corpora with a
# sentence per line three times faster to split.
_TERMINAL = regex.compile(r"[.!?;\u2026\u203c\u203d\u2047-\u2049\u3002\ufe52\ufe57\uff01\uff0e\uff1f\uff61]")
# Searched for from the end, as is the last letter: a search from each mark on would cost the square of a run of marks.
_LAST_IN_WORD = regex.compile(r"(?r)\w")

# Sentence ends of scripts that syntok does not know, with the closing quotes and brackets after them: Unicode's list
# without the marks of European text and without Myanmar's U+104A, a comma, but with Tibetan's shad and the Greek
# question mark, which it lacks. Between digits a full-width stop is a decimal point.
_OWN_MARK = r"[[\p{Sentence_Terminal}\u0f0d\u0f0e\u037e]--[\x00-\x7f\u104a\u2000-\u206f\u2e00-\u2e7f]]"
_OWN_END = regex.compile(
    rf"(?:(?!(?<=\d)[\uff0e\uff61](?=\d)){_OWN_MARK})[!?\u2026]*(?:{_OWN_MARK}|[!?\u2026])*"
    r"(?P<closing>[\p{Close_Punctuation}\p{Final_Punctuation}\"']*)",
    regex.VERSION1,
)
_LETTER = regex.compile(r"\p{Letter}")
_LAST_LETTER = regex.compile(r"(?r)\p{Letter}")
_GREEK = regex.compile(r"\p{Greek}")
# Scripts without sentence ends, with spaces between phrases only.
_WITHOUT_MARKS = regex.compile(r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]{20}")
# Text of such a script is cut at spaces beyond this length; sentences elsewhere have about 120 characters.
_UNMARKED_CHARS = 200

# A long sentence may be cut after a mark of a clause (in scripts with spaces: one before a space), or at a space.
_CLAUSE_END = regex.compile(
    r"[[\p{Terminal_Punctuation}\u2026\u2014]&&[\x00-\u058e]](?=\s)"
    r"|[[\p{Terminal_Punctuation}\u0f0d\u2026\u2014]--[\x00-\u058e]](?![\p{Close_Punctuation}\p{Final_Punctuation}\d])",
    regex.VERSION1,
)
_SPACE = regex.compile(r"\s")
# Never cut before these, which belong to the character before them.
_ATTACHED = regex.compile(r"[\p{Mark}\u200c\u200d]")


def sentence_spans(line: str) -> list[tuple[int, int]]:
    """(start, end) offsets of the sentences of a line in order, stripped, with only spaces between them.

    A semicolon does not end a sentence, except in Greek (in syntok it does before a capital letter or a quote).
    """
    spans: list[tuple[int, int]] = []
    for start, end in _between_own_ends(line):
        inner = start
        for sentence_end in _european_ends(line[start:end]):
            spans.extend(_stripped(line, inner, start + sentence_end))
            inner = start + sentence_end
    if line.isascii() or not _WITHOUT_MARKS.search(line):
        return spans
    return [
        piece
        for start, end in spans
        for piece in (
            cut_span(line, start, end, _UNMARKED_CHARS) if _WITHOUT_MARKS.search(line, start, end) else [(start, end)]
        )
    ]


def _stripped(line: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The span without spaces at its ends; nothing if it has only spaces."""
    text = line[start:end]
    left = len(text) - len(text.lstrip())
    if left < len(text):
        yield start + left, start + len(text.rstrip())


def _between_own_ends(line: str) -> Iterator[tuple[int, int]]:
    """Cut the line after each mark of _OWN_END; a piece without a letter stays with the piece before it."""
    start = searched = 0  # no letter is between the two
    if not line.isascii() and (last := _LAST_LETTER.search(line)):
        for match in _OWN_END.finditer(line, 0, last.start()):
            if _goes_on(line, match):
                continue
            end = match.end()
            if _LETTER.search(line, searched, end):
                yield start, end
                start = end
            searched = end
    yield start, len(line)


def _goes_on(line: str, match: regex.Match[str]) -> bool:
    """Whether the sentence continues after the quotation that ends here: 「行くの？」と聞いた。 or “去吗？”他问。"""
    following = line[match.end() : match.end() + 1]
    if not match["closing"] or not following.isalpha():
        return False
    return "\u3041" <= following <= "\u309f" or match[0][0] in "\uff01\uff1f"


def _has_inner_end(text: str) -> bool:
    last = _LAST_IN_WORD.search(text)
    return last is not None and _TERMINAL.search(text, 0, last.start()) is not None


def _european_ends(text: str) -> Iterator[int]:
    """Offsets just after each sentence by syntok's rules; the last is the text's length."""
    if _has_inner_end(text):
        ends = [
            sentence[-1].offset + len(sentence[-1].value)
            for paragraph in segmenter.analyze(text)
            for sentence in paragraph
        ]
        yield from (end for end in ends[:-1] if text[end - 1] != ";" or _GREEK.match(text, end - 2))
    yield len(text)


def cut_span(line: str, start: int, end: int, max_chars: int) -> list[tuple[int, int]]:
    """Cut line[start:end] into stripped pieces of at most `max_chars` characters, as (start, end) offsets.

    A piece ends after the last mark of a clause in its second half, else at the last space in its last three quarters,
    else at its full length, but never between a character and its marks, unless they fill it. Each piece, also the
    last, has at least a sixth of `max_chars`.
    """
    pieces: list[tuple[int, int]] = []
    while end - start > max_chars:
        longest = min(max_chars, -(-2 * (end - start) // 3))
        cut = _last(_CLAUSE_END, line, start + longest // 2, start + longest)
        cut = before = cut or _last(_SPACE, line, start + longest // 4, start + longest) or start + longest
        while before > start + 1 and _ATTACHED.match(line, before):
            before -= 1
        if not _ATTACHED.match(line, before):  # else there is nothing but marks
            cut = before
        pieces.extend(_stripped(line, start, cut))
        start = next((piece[0] for piece in _stripped(line, cut, end)), end)
    pieces.extend(_stripped(line, start, end))
    return pieces


def _last(pattern: regex.Pattern[str], line: str, start: int, end: int) -> int:
    """The end of the last match inside line[start:end]; 0 if there is none."""
    return max((match.end() for match in pattern.finditer(line, start, end)), default=0)
