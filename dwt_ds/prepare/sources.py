"""The interface of all sources of documents, and how their lines and records become documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

UTF_8 = "utf-8"
# A longer document is split into parts of about this many characters, each of which counts as a document.
DOCUMENT_CHARS = 8_000_000
# A longer line is cut at a space, since some texts have no line ends at all.
LINE_CHARS = 1_000_000
_LINE_END = re.compile(r"\r+\n|\r")


@dataclass
class SourceCounts:
    """Counts of one source."""

    documents: int = 0
    lines: int = 0
    characters: int = 0
    invalid_utf8: int = 0
    """Byte sequences invalid in the source's encoding, each replaced by U+FFFD."""
    long_lines_cut: int = 0
    """Lines of more than LINE_CHARS characters, cut at a space."""
    records: int = 0
    """Of a .jsonl, .parquet or dataset, with text or without."""
    unreadable_records: int = 0
    """Records of a .jsonl, .parquet, FASTA or dataset that hold no text."""
    read_as: str = ""
    """The format, if it was recognized by the content and not by the name: "JSON lines"."""
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
        """For progress: how many of `unit` there are; 0 if that is not known."""

    @property
    def unit(self) -> str:
        """For progress: "B" or "records"."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for an interrupted preparation to resume, as JSON values."""

    def documents(self, counts: SourceCounts) -> Iterator[str]:
        """Documents in order, as non-empty stripped lines joined by newlines; adds to `counts`."""


class DocumentTally:
    """Joins lines into documents and counts them; splits documents that are too long."""

    def __init__(self, counts: SourceCounts) -> None:
        self._counts = counts
        self._lines: list[str] = []
        self._size = 0

    def add(self, line: str) -> Iterator[str]:
        """Add a line, ignored if empty; yields the document so far if it has become too long."""
        if line:
            self._lines.append(line)
            self._size += len(line)
            if self._size > DOCUMENT_CHARS:
                yield from self.end()

    def end(self) -> Iterator[str]:
        """Yields the document so far, if there is one; the next line begins a new one."""
        if self._lines:
            yield self.document(self._lines)
            self._lines, self._size = [], 0

    def document(self, lines: list[str]) -> str:
        """Count and return the document of these lines."""
        document = "\n".join(lines)
        self._counts.documents += 1
        self._counts.lines += len(lines)
        self._counts.characters += len(document)
        return document


@dataclass(frozen=True)
class TextForm:
    """How the text of files and of records (of a .jsonl, a .parquet or a dataset) is stored."""

    column: str = "text"
    """Column of the records' text."""
    are_lines: bool = False
    """Each record is a line, and an empty one ends a document (BookCorpus, WikiText); otherwise it is a document."""
    encoding: str = UTF_8
    """Of text files and columns of bytes. A column of strings should be UTF-8; strings that are not use this."""

    def changed(self) -> dict[str, Any]:
        """The fields that are not the default, for `Source.identity`."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    def check_column(self, source: str, columns: list[str]) -> None:
        """Raises ValueError if `source` has no such column."""
        if self.column not in columns:
            raise ValueError(
                f'{source} has no column "{self.column}" but {", ".join(columns)}: name one with --text-column'
            )

    def documents(self, texts: Iterator[str | None], counts: SourceCounts) -> Iterator[str]:
        """Documents from the texts of records; a None counts as an unreadable record."""
        tally = DocumentTally(counts)
        for text in texts:
            counts.records += 1
            if not isinstance(text, str):
                counts.unreadable_records += 1
                continue
            for raw in with_line_feeds(text).split("\n"):
                for line in short_lines(raw.strip(), counts):
                    yield from tally.add(line)
            if not self.are_lines or not text.strip():
                yield from tally.end()
        yield from tally.end()


def with_line_feeds(text: str) -> str:
    """`text` with LF where a line ends with CR LF, with CR alone as on old Macs, or with several CRs before an LF."""
    return _LINE_END.sub("\n", text) if "\r" in text else text


def short_lines(line: str, counts: SourceCounts) -> Iterator[str]:
    """`line` in parts of at most LINE_CHARS characters, cut at spaces if possible."""
    while len(line) > LINE_CHARS:
        cut = line.rfind(" ", 0, LINE_CHARS) + 1 or LINE_CHARS
        yield line[:cut].strip()
        line = line[cut:]
        counts.long_lines_cut += 1
    yield line
