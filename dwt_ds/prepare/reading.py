"""Documents from local files: text, JSON lines, FASTA and parquet, compressed or not, in bounded memory."""

from __future__ import annotations

import glob
import gzip
import lzma
import os
import re
import shlex
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import pyarrow as pa
import pyarrow.parquet

from dwt_ds.base.files import escape_existing
from dwt_ds.base.words import check_fits_a_line
from dwt_ds.prepare.encoding import TextDecoder, advice
from dwt_ds.prepare.encoding_guess import guess_by_marks
from dwt_ds.prepare.fasta import FASTA_SUFFIXES, looks_like_fasta, sequences
from dwt_ds.prepare.records import HEAD_LINES, RECORD_CHARS, column_texts, json_texts, looks_like_json_lines
from dwt_ds.prepare.sources import (
    LINE_CHARS,
    UTF_8,
    DocumentTally,
    SourceCounts,
    TextForm,
    short_lines,
    with_line_feeds,
)

_BLOCK_BYTES = 1 << 20
# First bytes of a file that tell binary files from text.
_PROBE_BYTES = 8192
_COMPRESSIONS = (".gz", ".xz", ".zst")
_TABLES = (".csv", ".tsv")
# How files of XML or HTML begin, and the plain output of WikiExtractor.
_MARKUP = re.compile(r"<(?:\?xml|!doctype|html|mediawiki|doc)[\s>]", re.IGNORECASE)


@dataclass(frozen=True)
class LocalFile:
    """A local file. Compression, parquet and FASTA are recognized by suffix, JSON lines by their content."""

    path: Path
    form: TextForm = TextForm()
    unit: ClassVar[str] = "B"

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def identity(self) -> dict[str, Any]:
        status = self.path.stat()
        facts = {"file": str(self.path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        return facts | self.form.changed()

    def documents(self, counts: SourceCounts) -> Iterator[str]:
        """Raises ValueError for a file that is damaged, lacks the column, or is in another encoding."""
        try:
            yield from self._documents(counts)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, pa.ArrowException) as error:
            raise ValueError(f"{self.path} is damaged ({error}): replace it or leave it out") from None
        except UnicodeError as error:  # UTF-16 or UTF-32 without a byte order mark; invalid bytes raise nothing
            raise ValueError(f"{self.path} cannot be read as {self.form.encoding}: {error}") from None
        except OSError as error:
            if error.errno is not None:
                raise
            # Only Arrow's errors, here of a .zst, have no number.
            if "too much memory" in str(error):
                raise ValueError(
                    f"{self.path} was compressed with a window of more than 128 MB (zstd --long=28 or above): "
                    f"decompress it with `zstd -d --long=31 {shlex.quote(str(self.path))}`"
                ) from None
            raise ValueError(f"{self.path} is damaged ({error}): replace it or leave it out") from None

    def _documents(self, counts: SourceCounts) -> Iterator[str]:
        if self.size == 0:
            counts.skipped = "empty"
            return
        suffix = self._suffix()
        if suffix == ".parquet":
            columns = _parquet_column(self.path, self.form, counts)
            yield from self.form.documents(column_texts(columns, self.form, self.name, counts), counts)
            return
        with open(self.path, "rb") as raw, self._decompressed(raw) as file:
            decoder = TextDecoder(self.form.encoding, self.name, counts)
            probe = file.read(_PROBE_BYTES)
            if self.form.encoding == UTF_8 and guess_by_marks(probe):
                raise ValueError(f"{self.path}: {advice(probe)}")
            start = decoder.decode(probe)
            if "\0" in start:
                counts.skipped, counts.invalid_utf8 = "binary", 0
                return
            most_characters = self.size if file is raw else None
            lines = _lines(start, decoder, file, raw, most_characters, counts)
            yield from self._documents_of_lines(lines, suffix, counts)

    def _documents_of_lines(self, lines: Iterator[str], suffix: str, counts: SourceCounts) -> Iterator[str]:
        start = _head(lines)
        head = [line for line in start if line]
        lines = chain(start, lines)
        if looks_like_fasta(head, self.path, suffix):
            counts.read_as = "" if suffix in FASTA_SUFFIXES else "FASTA"
            yield from sequences(lines, counts)
        elif suffix == ".jsonl" or looks_like_json_lines(head, self.name, called_json=suffix == ".json"):
            counts.read_as = "" if suffix == ".jsonl" else "JSON lines"
            yield from self.form.documents(json_texts(lines, self.form, self.name, counts), counts)
        else:
            _check_is_prose(head, self.path, suffix)
            yield from _blank_line_separated(lines, counts)

    def _suffix(self) -> str:
        """The last suffix before that of the compression, in lower case."""
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        if suffixes and suffixes[-1] in _COMPRESSIONS:
            suffixes.pop()
        return suffixes[-1] if suffixes else ""

    def _decompressed(self, raw: BinaryIO) -> BinaryIO:
        suffix = self.path.suffix.lower()
        if suffix == ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        if suffix == ".xz":
            return cast(BinaryIO, lzma.LZMAFile(raw))
        if suffix == ".zst":
            return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))
        return raw


def find_files(patterns: list[str], form: TextForm) -> list[LocalFile]:
    """The files that `patterns` (names or globs) match, in the order of the patterns, each glob's sorted by name.

    Raises FileNotFoundError for a pattern without a match; ValueError for a folder, a file that is named twice, or a
    name that `check_fits_a_line` refuses, since manifests and messages cannot hold it.
    """
    files: list[LocalFile] = []
    for pattern in map(os.path.expanduser, patterns):
        path = Path(pattern)
        if path.is_dir():
            raise ValueError(f"--text {pattern} is a folder: name its files, for instance '{pattern}/**' for all")
        names = [pattern] if path.is_file() else sorted(glob.glob(escape_existing(pattern), recursive=True))
        found = [path for path in map(Path, names) if path.is_file()]
        if not found:
            raise FileNotFoundError(f"--text {pattern}: no such file")
        files.extend(LocalFile(path, form) for path in found)
    seen: set[str] = set()
    for file in files:
        check_fits_a_line(str(file.path))
        name = str(file.path.resolve())
        if name in seen:
            raise ValueError(f"--text {name} is named twice: leave one out")
        seen.add(name)
    return files


def _lines(
    start: str, decoder: TextDecoder, file: BinaryIO, raw: BinaryIO, most_characters: int | None, counts: SourceCounts
) -> Iterator[str]:
    """Stripped lines, also empty ones, of `start` and the rest of `file`, which decompresses `raw`.

    Lines are cut at a space after LINE_CHARS characters; those that may be JSON records after RECORD_CHARS.
    `most_characters` is an upper bound on the file's characters; None if it is compressed.
    """
    rest = start
    while True:
        block = file.read(_BLOCK_BYTES)
        counts.position = raw.tell()
        text = rest + decoder.decode(block, final=not block)
        if not block:
            decoder.check(0)
        elif most_characters is not None:
            decoder.check(most_characters)
        # CRs at the end may be the first half of a line end.
        end = (text.rfind("\n") + 1 or text.rstrip("\r").rfind("\r") + 1) if block else len(text)
        if end == 0 and len(text) > (RECORD_CHARS if text.lstrip().startswith("{") else LINE_CHARS):
            end = text.rfind(" ") + 1 or len(text)
            counts.long_lines_cut += 1
        text, rest = text[:end], text[end:]
        if text:
            for line in with_line_feeds(text).removesuffix("\n").split("\n"):
                yield line.strip()
        if not block:
            return


def _head(lines: Iterator[str]) -> list[str]:
    """Take lines off `lines` up to the HEAD_LINES-th that has text."""
    start: list[str] = []
    with_text = 0
    for line in lines:
        start.append(line)
        with_text += bool(line)
        if with_text == HEAD_LINES:
            break
    return start


def _check_is_prose(head: Sequence[str], path: Path, suffix: str) -> None:
    """Raises ValueError for a file whose separators or tags would be trained on as prose.

    `head` has its first lines with text, stripped; `suffix` is in lower case.
    """
    if suffix in _TABLES:
        raise ValueError(
            f"{path} is a table, not text: put it into a folder and name the folder with --dataset and the column with "
            "--text-column"
        )
    if head and _MARKUP.match(head[0]):
        raise ValueError(
            f"{path} is XML or HTML, whose tags would be trained on: extract its text first "
            "(a dump of Wikipedia: wikiextractor --json)"
        )


def _blank_line_separated(lines: Iterator[str], counts: SourceCounts) -> Iterator[str]:
    tally = DocumentTally(counts)
    for line in lines:
        if not line:
            yield from tally.end()
        for part in short_lines(line, counts):
            yield from tally.add(part)
    yield from tally.end()


def _parquet_column(path: Path, form: TextForm, counts: SourceCounts) -> Iterator[pa.Array]:
    file = pyarrow.parquet.ParquetFile(path)
    form.check_column(str(path), file.schema_arrow.names)
    size = path.stat().st_size
    read = 0
    for batch in file.iter_batches(batch_size=1024, columns=[form.column]):
        read += len(batch)
        counts.position = size * read // max(1, file.metadata.num_rows)
        yield batch.column(0)
