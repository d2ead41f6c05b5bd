"""Where documents come from: what every source provides, and datasets of the Hugging Face hub as one of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import datasets

from dwt_ds.base.words import one_line

# A longer document is passed on in parts of about this many characters; each counts as a document.
DOCUMENT_CHARS = 8_000_000
# A longer line is cut at a space; some texts have no line ends at all.
LINE_CHARS = 1_000_000
_RECORDS_A_READ = 1000


@dataclass
class SourceCounts:
    """What was found in one source."""

    documents: int = 0
    lines: int = 0
    characters: int = 0
    invalid_utf8: int = 0
    """Invalid byte sequences, each replaced by U+FFFD."""
    long_lines_cut: int = 0
    """Lines of more than LINE_CHARS characters, cut at a space."""
    unreadable_records: int = 0
    """Records of a .jsonl, .parquet or dataset that hold no text."""
    skipped: str = ""
    """Why the whole source was skipped: "empty" or "binary"."""
    position: int = 0
    """How much of the source has been read, in its unit."""


class Source(Protocol):
    """Something that documents come from."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def size(self) -> int:
        """For progress: how many of `unit` there are; 0 where that is unknown."""

    @property
    def unit(self) -> str:
        """For progress: "B" or "records"."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for an interrupted preparation to resume, as JSON values."""

    def documents(self, counts: SourceCounts) -> Iterator[str]:
        """Documents in order: their non-empty lines, stripped, joined by newlines. Fills `counts` on the way."""


class DocumentTally:
    """Joins lines into documents and counts them; a document that grows too long is passed on in parts."""

    def __init__(self, counts: SourceCounts) -> None:
        self._counts = counts
        self._lines: list[str] = []
        self._size = 0

    def add(self, line: str) -> Iterator[str]:
        """Take one line, unless it is empty; yields the document so far once it is long enough."""
        if line:
            self._lines.append(line)
            self._size += len(line)
            if self._size > DOCUMENT_CHARS:
                yield from self.end()

    def end(self) -> Iterator[str]:
        """Yields the document so far, if there is one; the next line starts another."""
        if self._lines:
            yield self.document(self._lines)
            self._lines, self._size = [], 0

    def document(self, lines: list[str]) -> str:
        """A whole document at once."""
        document = "\n".join(lines)
        self._counts.documents += 1
        self._counts.lines += len(lines)
        self._counts.characters += len(document)
        return document


@dataclass(frozen=True)
class RecordForm:
    """How records of a .jsonl, a .parquet or a dataset are read."""

    column: str = "text"
    """Where the text is."""
    are_lines: bool = False
    """Each record is one line, an empty one ends a document (as in BookCorpus and WikiText); else it is a document."""

    def check_column(self, source: str, columns: list[str]) -> None:
        """Raises ValueError where the column is not among those of `source`."""
        if self.column not in columns:
            raise ValueError(
                f'{source} has no column "{self.column}" but {", ".join(columns)}: name one with --text-column'
            )

    def documents(self, texts: Iterator[str | None], counts: SourceCounts) -> Iterator[str]:
        """Documents of `texts`, one a record; a record's line ends are line ends. None is an unreadable record."""
        tally = DocumentTally(counts)
        for text in texts:
            if not isinstance(text, str):
                counts.unreadable_records += 1
                continue
            for raw in text.split("\n"):
                for line in short_lines(raw.strip(), counts):
                    yield from tally.add(line)
            if not self.are_lines or not text.strip():
                yield from tally.end()
        yield from tally.end()


def short_lines(line: str, counts: SourceCounts) -> Iterator[str]:
    """`line` in parts of at most LINE_CHARS characters, cut at spaces where it has any."""
    while len(line) > LINE_CHARS:
        cut = line.rfind(" ", 0, LINE_CHARS) + 1 or LINE_CHARS
        yield line[:cut].strip()
        line = line[cut:]
        counts.long_lines_cut += 1
    yield line


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset. `datasets` 5 reads parquet, json, csv, text and Arrow ones; script datasets no longer."""

    dataset: str
    """A name on the hub, or a local folder (of data files, or of `Dataset.save_to_disk`)."""
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    """Read over the network as it is used, twice, rather than stored first."""
    records: RecordForm = RecordForm()

    @classmethod
    def parse(cls, text: str, streaming: bool, records: RecordForm) -> HubDataset:
        """NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (an empty CONFIG is the default one)."""
        name, config, split, *rest = *text.split(":"), "", ""
        if not name or len(rest) > 2 or any(rest):
            raise ValueError(f"--dataset {text}: write NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
        return cls(name, config or None, split or "train", streaming, records)

    @property
    def name(self) -> str:
        return ":".join([self.dataset, self.config or "", self.split])

    @property
    def size(self) -> int:
        """Records; 0 for a stream."""
        return 0 if self.streaming else len(self._loaded)

    @property
    def unit(self) -> str:
        return "records"

    def identity(self) -> dict[str, Any]:
        content = {} if self.streaming else {"records": len(self._loaded), "fingerprint": self._loaded._fingerprint}
        return {"dataset": self.dataset, "config": self.config, "split": self.split, **content}

    @cached_property
    def _loaded(self) -> Any:
        try:
            if Path(self.dataset, "state.json").is_file():
                loaded = datasets.load_from_disk(self.dataset)
            else:
                loaded = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:  # the library raises errors of many kinds, its network layers' included
            raise ValueError(f"--dataset {self.name} cannot be loaded: {one_line(error)}") from None
        self.records.check_column(f"dataset {self.name}", list(loaded.column_names or [self.records.column]))
        return loaded.select_columns([self.records.column])

    def documents(self, counts: SourceCounts) -> Iterator[str]:
        return self.records.documents(self._texts(counts), counts)

    def _texts(self, counts: SourceCounts) -> Iterator[str | None]:
        for batch in self._loaded.iter(batch_size=_RECORDS_A_READ):
            texts = batch[self.records.column]
            counts.position += len(texts)
            yield from texts
