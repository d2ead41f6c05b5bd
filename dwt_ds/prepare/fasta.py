"""Sequences of proteins or nucleotides out of FASTA files: a record is a document of one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dwt_ds.prepare.sources import LINE_CHARS, DocumentTally, SourceCounts, short_lines

FASTA_SUFFIXES = (".fasta", ".fas", ".fa", ".faa", ".fna", ".ffn", ".frn")
# Also the code of Persian, which parallel corpora have as a suffix.
_AMBIGUOUS_SUFFIX = ".fa"
_HEADER, _COMMENT = ">", ";"
# A line of a sequence: capitals, or nucleotides in small letters. No line of prose is that and so long as the first.
_SEQUENCE = re.compile(r"[A-Z*-]+|[acgtun*-]+")
_FIRST_LINE_CHARS = 20


def looks_like_fasta(head: Sequence[str], path: Path, suffix: str) -> bool:
    """Whether a file is FASTA, by its suffix or its first lines with text, stripped.

    Raises:
        ValueError: it is called FASTA and does not begin with a header line.
    """
    if suffix not in FASTA_SUFFIXES:
        return _is_fasta_by_content(head)
    if next((line for line in head if not line.startswith(_COMMENT)), _HEADER).startswith(_HEADER):
        return True
    if suffix == _AMBIGUOUS_SUFFIX:
        return False
    raise ValueError(f'{path} is no FASTA file: its first line does not begin with "{_HEADER}"; rename or convert it')


def _is_fasta_by_content(head: Sequence[str]) -> bool:
    """Whether lines, stripped, are a header and a sequence, or several of them."""
    letters = [line for line in head if not line.startswith(_HEADER)]
    if not letters or not head[0].startswith(_HEADER) or len(letters[0]) < _FIRST_LINE_CHARS:
        return False
    return all(map(_SEQUENCE.fullmatch, letters))


def sequences(lines: Iterable[str], counts: SourceCounts) -> Iterator[str]:
    """One document a record: its sequence lines joined, white space taken out; the header line is no text.

    A sequence of more than LINE_CHARS letters has several lines, as any other long line. A record without a sequence
    is counted among the unreadable ones.
    """
    tally = DocumentTally(counts)
    sequence = ""
    is_empty = False  # the record under way has had a header and no letters
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
