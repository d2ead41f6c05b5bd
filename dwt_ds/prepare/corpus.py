"""The text of all sources, read twice: first a survey (totals, duplicate lines, a sample), then chunks of documents."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dwt_ds.base.files import atomic_file, read_json, write_json
from dwt_ds.data.row_hashes import key_of
from dwt_ds.prepare.duplicates import DuplicateFinder, without_duplicates
from dwt_ds.prepare.rows import Chunk
from dwt_ds.prepare.sources import Source, SourceCounts

# Documents are handed to workers in chunks of at least this many characters. Part of what the rows depend on.
CHUNK_CHARS = 4_000_000
_HOLD_OUT_STREAM = 5
_TOKENIZER_STREAM = 6
# A tokenizer is trained on at most this many characters, whole documents drawn uniformly.
TOKENIZER_SAMPLE_CHARS = 64_000_000
_WORD = 1 << 64
# A document with more than this many times the characters to hold out in all is not held out whole.
_MUCH_LONGER = 2
_SECONDS_BETWEEN_LINES = 15.0


@dataclass
class Survey:
    """Results of the first pass."""

    per_source: list[SourceCounts]
    duplicate_bits: np.ndarray
    """uint8, a bit per line (see `DuplicateFinder.finish`); empty if duplicates are kept."""
    sample: list[str] = field(default_factory=list)
    """Documents to train a tokenizer on, in order; not stored."""

    @property
    def documents(self) -> int:
        return sum(counts.documents for counts in self.per_source)

    @property
    def characters(self) -> int:
        return sum(counts.characters for counts in self.per_source)

    @property
    def duplicate_lines(self) -> int:
        return int(np.unpackbits(self.duplicate_bits).sum())

    def store(self, work: Path) -> None:
        """Write it to the work folder, for the next attempt if this one is interrupted."""
        with atomic_file(work / "duplicates.npy") as file:
            np.save(file, self.duplicate_bits)
        write_json(work / "survey.json", {"per_source": [asdict(counts) for counts in self.per_source]})

    @classmethod
    def stored(cls, work: Path) -> Survey | None:
        """The survey that an earlier attempt stored in the work folder, if any.

        Raises ValueError if it is of a version whose counts and parts do not go with those made now.
        """
        path = work / "survey.json"
        if not path.is_file():
            return None
        counts_of_each = read_json(path)["per_source"]
        if any("records" not in counts for counts in counts_of_each):
            raise ValueError(f"{work} was left by an earlier version: remove the output folder and start again")
        return cls([SourceCounts(**counts) for counts in counts_of_each], np.load(work / "duplicates.npy"))


def survey(sources: Sequence[Source], work: Path, *, find_duplicates: bool, want_sample: bool, seed: int) -> Survey:
    """Read all sources once; `work` is a folder for temporary files."""
    per_source = [SourceCounts() for _ in sources]
    finder = DuplicateFinder(work / "hashes") if find_duplicates else None
    sample = _DocumentSample(seed)
    sizes = [source.size for source in sources]
    units = {source.unit for source in sources}
    comparable = all(sizes) and len(units) == 1
    number = before = 0
    with progress_bar("reading", sum(sizes) if comparable else None, units.pop() if comparable else "char") as bar:
        for source, counts, size in zip(sources, per_source, sizes, strict=True):
            for document in source.documents(counts):
                if finder:
                    finder.add(document.split("\n"))
                if want_sample:
                    sample.offer(number, document)
                number += 1
                bar.update(before + (counts.position if comparable else counts.characters) - bar.n)
            before += size if comparable else counts.characters
            bar.update(before - bar.n)
    bits = finder.finish() if finder else np.zeros(0, dtype=np.uint8)
    return Survey(per_source, bits, sample.documents())


def progress_bar(title: str, total: int | None, unit: str) -> tqdm[None]:
    """A bar with rate and time left; on outputs that are no terminal, a line every 15 seconds."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        unit_scale=True,
        file=sys.stderr,
        mininterval=0.2 if interactive else _SECONDS_BETWEEN_LINES,
        ncols=None if interactive else 100,
    )


class _DocumentSample:
    """A uniform sample of documents, bounded in size and the same for the same corpus: those whose hash is below a
    threshold, which is halved whenever the sample becomes too large."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._threshold = _WORD
        self._kept: list[tuple[int, str]] = []
        self._characters = 0

    def offer(self, number: int, document: str) -> None:
        key = key_of(_TOKENIZER_STREAM, self._seed, number)
        if key < self._threshold:
            self._kept.append((key, document))
            self._characters += len(document)
            while self._characters > TOKENIZER_SAMPLE_CHARS and len(self._kept) > 1:
                self._threshold //= 2
                self._kept = [kept for kept in self._kept if kept[0] < self._threshold] or self._kept[:1]
                self._characters = sum(len(document) for _, document in self._kept)

    def documents(self) -> list[str]:
        return [document for _, document in self._kept]


@dataclass
class Corpus:
    """The second pass over the sources: documents without duplicate lines, in chunks."""

    sources: Sequence[Source]
    survey: Survey
    validation: float
    """Share of the documents that is held out, or of the text if they are too long for that."""
    seed: int
    validation_documents: int = 0
    """Held out so far, in this pass."""
    duplicate_characters: int = 0
    """In duplicate lines left out so far, in this pass."""

    def chunks(self) -> Iterator[Chunk]:
        """In order; a chunk has consecutive documents.

        Raises ValueError if a source has changed since the survey.
        """
        chunk, characters = Chunk(0, [], [], []), 0
        for document, held_out, source in self._documents():
            chunk.documents.append(document)
            chunk.held_out.append(held_out)
            chunk.source_of_document.append(source)
            characters += len(document)
            if characters >= CHUNK_CHARS:
                yield chunk
                chunk, characters = Chunk(chunk.index + 1, [], [], []), 0
        if chunk.documents:
            yield chunk

    def _documents(self) -> Iterator[tuple[str, bool, int]]:
        """(document, whether it is held out, index of its source)"""
        number = line = 0
        bits = self.survey.duplicate_bits
        for index, (source, before) in enumerate(zip(self.sources, self.survey.per_source, strict=True)):
            counts = SourceCounts()
            for document in source.documents(counts):
                lines = document.split("\n")
                kept = without_duplicates(lines, line, bits) if len(bits) else lines
                line += len(lines)
                if kept is not lines:
                    self.duplicate_characters += sum(map(len, lines)) - sum(map(len, kept))
                for part, held_out in self._split_off(number, len(document), kept):
                    yield part, held_out, index
                number += 1
            if counts != before:
                raise ValueError(f"{source.name} changed while it was read: remove the output folder and start again")

    def is_too_long(self, characters: int) -> bool:
        """Whether a document of so many characters is far more than what is to be held out of the whole text."""
        return characters > _MUCH_LONGER * self.validation * self.survey.characters

    def _split_off(self, number: int, characters: int, lines: list[str]) -> Iterator[tuple[str, bool]]:
        """(document, whether it is held out). If a document to hold out is too long, its last lines are held out.

        The `characters` of the document include its duplicate lines; `lines` does not.
        """
        can_be_split = len(lines) > 1
        held_out = is_held_out(number, self.survey.documents, self.validation, self.seed)
        held_out &= can_be_split or self.survey.documents > 1
        self.validation_documents += held_out
        if held_out and can_be_split and self.is_too_long(characters):
            tails = np.cumsum([len(line) for line in lines[:0:-1]])  # characters of the last line, of the last two, ...
            wanted = self.validation * self.survey.characters * sum(map(len, lines)) / characters
            tail = int(np.abs(tails - wanted).argmin()) + 1
            yield "\n".join(lines[:-tail]), False
            lines = lines[-tail:]
        yield "\n".join(lines), held_out


def is_held_out(number: int, documents: int, share: float, seed: int) -> bool:
    """Whether document `number` of `documents` is held out: one of each 1 / share consecutive documents, at random, or
    one of all if there are fewer."""
    if not share:
        return False
    period = min(round(1 / share), documents)
    return number % period == key_of(_HOLD_OUT_STREAM, seed, number // period) % period
