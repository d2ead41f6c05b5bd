"""Words for people: the nearest name to a mistyped one, errors on one line, tables."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

GIB = 2**30


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the candidate most like `word` in any case; "" if none is like it."""
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=0.5)
    return f"; did you mean {by_lower_case[matches[0]]!r}?" if matches else ""


def one_line(error: BaseException, *, with_type: bool = False) -> str:
    """The first two lines of an error's message on one, at most 300 characters; its type's name if there is no message.

    Two, because the first line of a library's message may say too little. `with_type` puts the type's name before it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name, message = type(error).__name__, " ".join(lines[:2]).rstrip(" .;:")
    return f"{name}: {shorten(message, 300)}" if with_type and message else shorten(message, 300) or name


@contextmanager
def prefix_errors(field: str) -> Iterator[None]:
    """Within the block, an error's message gets the name of a field or a file in front, unless it has it already."""
    try:
        yield
    except UnicodeError as error:  # it cannot be constructed from a message
        raise ValueError(f"{field}: {error}") from error
    except (ValueError, OSError) as error:
        if field in str(error):
            raise
        raise type(error)(f"{field}: {error}") from error


def shorten(text: str, length: int = 60) -> str:
    """`text`, its end replaced by `...` where it is longer than `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def table(rows: Iterable[Sequence[str]], align: str = "<") -> list[str]:
    """Lines of columns, each as wide as its widest cell, two spaces apart; a row may end early.

    `align` has `<` or `>` for each column from the left; the last one holds for the columns that follow.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    aligns = align.ljust(len(widths), align[-1])
    return ["  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligns, widths)).rstrip() for row in rows]


def check_fits_a_line(text: str) -> str:
    """Returns `text`; ValueError, which begins with it, for line breaks, control characters and what is not UTF-8."""
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise ValueError(f"{text!r}: has a line break, a control character or a byte that is not UTF-8; rename it")
    return text
