"""The first pass over the sources: what is there, which lines repeat, and a sample to train a tokenizer on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dwt_ds.data.hashing import key_of
from dwt_ds.prepare.duplicates import DuplicateFinder
from dwt_ds.prepare.progress import Progress
from dwt_ds.prepare.reading import Source, SourceCounts

_TOKENIZER_STREAM = 6
# A tokenizer is trained on at most this many characters, whole documents drawn uniformly.
TOKENIZER_SAMPLE_CHARS = 64_000_000
_WORD = 1 << 64


@dataclass
class Survey:
    """Totals of a corpus."""

    per_source: list[SourceCounts]
    duplicate_lines: int = 0
    first_document_lines: int = 0
    """Lines of the first document; of interest where it is the only one."""
    sample: list[str] = field(default_factory=list)
    """Documents to train a tokenizer on, in order; not stored."""

    @property
    def documents(self) -> int:
        return sum(counts.documents for counts in self.per_source)

    @property
    def characters(self) -> int:
        return sum(counts.characters for counts in self.per_source)

    def to_json(self) -> dict[str, Any]:
        return {
            "per_source": [asdict(counts) for counts in self.per_source],
            "duplicate_lines": self.duplicate_lines,
            "first_document_lines": self.first_document_lines,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Survey:
        per_source = [SourceCounts(**counts) for counts in values["per_source"]]
        return cls(per_source, values["duplicate_lines"], values["first_document_lines"])


class _DocumentSample:
    """A uniform sample of documents of bounded size, the same for the same corpus: those whose hash lies under a
    threshold, which is halved whenever they become too many."""

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


def survey(
    sources: Sequence[Source], work: Path, *, find_duplicates: bool, want_sample: bool, seed: int
) -> tuple[Survey, np.ndarray]:
    """Read everything once. Returns the totals, and a bit for each line (see `DuplicateFinder.finish`; empty where
    duplicates are kept)."""
    result = Survey([SourceCounts() for _ in sources])
    finder = DuplicateFinder(work / "hashes") if find_duplicates else None
    sample = _DocumentSample(seed)
    sizes = [source.size for source in sources]
    units = {source.unit for source in sources}
    comparable = all(sizes) and len(units) == 1
    number = 0
    with Progress("reading", sum(sizes) if comparable else None, units.pop() if comparable else "char") as progress:
        for source, counts, size in zip(sources, result.per_source, sizes, strict=True):
            for document in source.documents(counts):
                lines = document.split("\n")
                if number == 0:
                    result.first_document_lines = len(lines)
                if finder:
                    finder.add(lines)
                if want_sample:
                    sample.offer(number, document)
                number += 1
                progress.at(counts.position if comparable else counts.characters)
            progress.done(size if comparable else counts.characters)
    bits = finder.finish() if finder else np.zeros(0, dtype=np.uint8)
    result.duplicate_lines = int(np.unpackbits(bits).sum())
    result.sample = sample.documents()
    return result, bits
