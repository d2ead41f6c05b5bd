"""Reads sequences of proteins or nucleotides from FASTA files: each record is a document of one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dwt_ds.prepare.sources import LINE_CHARS, DocumentTally, SourceCounts, short_lines

FASTA_SUFFIXES = (".fasta", ".fas", ".fa", ".faa", ".fna", ".ffn", ".frn")
# Also the language code of Persian, a suffix in parallel corpora.
_AMBIGUOUS_SUFFIX = ".fa"
_HEADER, _COMMENT = ">", ";"
# A line of a sequence: capitals, or nucleotides in lower case. The first has a minimum length, which excludes prose.
_SEQUENCE = re.compile(r"[A-Z*-]+|[acgtun*-]+")
_FIRST_LINE_CHARS = 20


def looks_like_fasta(head: Sequence[str], path: Path, suffix: str) -> bool:
    """Whether a file is FASTA, by its suffix or its first lines with text, stripped.

    Raises ValueError if it has a FASTA suffix but does not begin with a header line.
    """
    if suffix not in FASTA_SUFFIXES:
        return _is_fasta_by_content(head)
    if next((line for line in head if not line.startswith(_COMMENT)), _HEADER).startswith(_HEADER):
        return True
    if suffix == _AMBIGUOUS_SUFFIX:
        return False
    raise ValueError(f'{path} is not FASTA: its first line does not begin with "{_HEADER}"; rename or convert it')


def _is_fasta_by_content(head: Sequence[str]) -> bool:
    """Whether lines, stripped, are a header and a sequence, or several of them."""
    letters = [line for line in head if not line.startswith(_HEADER)]
    if not letters or not head[0].startswith(_HEADER) or len(letters[0]) < _FIRST_LINE_CHARS:
        return False
    return all(map(_SEQUENCE.fullmatch, letters))


def sequences(lines: Iterable[str], counts: SourceCounts) -> Iterator[str]:
    """One document per record: its sequence lines joined without white space; headers are dropped.

    A sequence of more than LINE_CHARS letters becomes several lines, like any long line. A record without a sequence
    counts as unreadable.
    """
    tally = DocumentTally(counts)
    sequence = ""
    is_empty = False  # the current record has a header and no letters so far
    for line in lines:
        if line.startswith(_HEADER):
            yield from tally.add(sequence)
            yield from tally.end()
            counts.unreadable_records += is_empty
            sequence, is_empty = "", True
        elif line and not line.startswith(_COMMENT):
            sequence += "".join(line.split())
            is_empty = False
            if len(sequence) > LINE_CHARS:
                *whole, sequence = short_lines(sequence, counts)
                for part in whole:
                    yield from tally.add(part)
    yield from tally.add(sequence)
    yield from tally.end()
    counts.unreadable_records += is_empty
