"""Holds out another document if the filters left no text of the held-out documents, or of all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from dwt_ds.prepare.corpus import Corpus
from dwt_ds.prepare.counts import ChunkCounts
from dwt_ds.prepare.packing import RowSettings
from dwt_ds.prepare.rows import Chunk, store_part

# Each trial costs the work of a chunk. A document of usual length nearly always has text.
_DOCUMENTS_TRIED = 8
_MARK = "held_out_instead"


def was_held_out_instead(work: Path) -> bool:
    """Whether `hold_out_another` found a document, in this attempt or an earlier one."""
    return (work / _MARK).is_file()


def hold_out_another(corpus: Corpus, parts: list[ChunkCounts], settings: RowSettings, work: Path) -> None:
    """Hold out another document of the chunk with the most rows, or last lines of one if the others are too long.

    Makes the part of that chunk again, updates its counts in `parts`, and leaves a mark in `work`. If the text cannot
    be divided, as where one line is left, it is trained on and not held out.
    """
    index = max(range(len(parts)), key=lambda number: parts[number].rows + parts[number].validation_rows)
    again = Corpus(corpus.sources, corpus.survey, corpus.validation, corpus.seed)  # `corpus` counts what it has read
    chunk = next(chunk for chunk in again.chunks() if chunk.index == index)
    rows_elsewhere = sum(part.rows for part in parts) - parts[index].rows
    for changed in _choices(chunk, corpus):
        counts = store_part(changed, settings, work)
        if counts.validation_rows and counts.rows + rows_elsewhere:
            parts[index] = counts
            (work / _MARK).touch()
            return
    for changed in (chunk, replace(chunk, held_out=[False] * len(chunk.documents))):
        parts[index] = store_part(changed, settings, work)
        if parts[index].rows + rows_elsewhere:
            return


def _choices(chunk: Chunk, corpus: Corpus) -> Iterator[Chunk]:
    """The chunk with another document held out, those of usual length first; then with last lines of the longest; then
    with a document that is too long, since none has two lines."""
    lengths = sorted(len(document) for document in chunk.documents if document)
    usual = lengths[len(lengths) // 2]
    order = sorted(range(len(chunk.documents)), key=lambda number: abs(len(chunk.documents[number]) - usual))
    others = list(islice((number for number in order if not chunk.held_out[number]), _DOCUMENTS_TRIED))
    too_long = [number for number in others if corpus.is_too_long(len(chunk.documents[number]))]
    yield from (_only(chunk, number) for number in others if number not in too_long)
    longest = max(range(len(chunk.documents)), key=lambda number: len(chunk.documents[number]))
    lines = chunk.documents[longest].split("\n")
    tail = 1
    while tail < len(lines):
        yield _without_tail(chunk, longest, lines[:-tail], lines[-tail:])
        tail *= 2
    yield from (_only(chunk, number) for number in too_long)


def _only(chunk: Chunk, number: int) -> Chunk:
    """The chunk with this document as the only held-out one."""
    return replace(chunk, held_out=[other == number for other in range(len(chunk.documents))])


def _without_tail(chunk: Chunk, number: int, lines: Sequence[str], tail: Sequence[str]) -> Chunk:
    """The chunk with the last lines of a document as the only held-out document, after that document."""
    documents, sources = list(chunk.documents), list(chunk.source_of_document)
    documents[number : number + 1] = ["\n".join(lines), "\n".join(tail)]
    sources.insert(number, sources[number])
    held_out = [other == number + 1 for other in range(len(documents))]
    return replace(chunk, documents=documents, source_of_document=sources, held_out=held_out)
