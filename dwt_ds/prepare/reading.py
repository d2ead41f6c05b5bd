"""Documents out of local files: plain text, .jsonl and .parquet, compressed or not; in order, in bounded memory."""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet

from dwt_ds.prepare.sources import LINE_CHARS, DocumentTally, RecordForm, SourceCounts, short_lines

_BLOCK_BYTES = 1 << 20
# Bytes at the start of a file that tell binary files from text.
_PROBE_BYTES = 8192
_COMPRESSIONS = (".gz", ".xz", ".zst")
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class LocalFile:
    """A local file; its suffixes tell form and compression."""

    path: Path
    records: RecordForm = RecordForm()

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def unit(self) -> str:
        return "B"

    def identity(self) -> dict[str, Any]:
        status = self.path.stat()
        return {"file": str(self.path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}

    def documents(self, counts: SourceCounts) -> Iterator[str]:
        """Raises ValueError, naming the file, where it is damaged or lacks the column."""
        try:
            yield from self._documents(counts)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, pa.ArrowInvalid) as error:
            raise ValueError(f"{self.path} is damaged ({error}): replace it or leave it out") from None
        except OSError as error:
            if error.errno is None:  # Arrow's error for a truncated .zst; the system's errors have a number
                raise ValueError(f"{self.path} is damaged ({error}): replace it or leave it out") from None
            raise

    def _documents(self, counts: SourceCounts) -> Iterator[str]:
        form = self._form()
        if self.size == 0:
            counts.skipped = "empty"
            return
        if form == ".parquet":
            yield from self.records.documents(_parquet_texts(self.path, self.records, counts), counts)
            return
        with open(self.path, "rb") as raw, self._decompressed(raw) as file:
            probe = file.read(_PROBE_BYTES)
            if b"\0" in probe:
                counts.skipped = "binary"
                return
            lines = _lines(probe.removeprefix(b"\xef\xbb\xbf"), file, raw, counts)
            if form == ".jsonl":
                yield from self.records.documents(_json_texts(lines, self.records.column, counts), counts)
            else:
                yield from _blank_line_separated(lines, counts)

    def _form(self) -> str:
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        if suffixes and suffixes[-1] in _COMPRESSIONS:
            suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in (".jsonl", ".parquet") else ".txt"

    def _decompressed(self, raw: BinaryIO) -> BinaryIO:
        suffix = self.path.suffix.lower()
        if suffix == ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        if suffix == ".xz":
            return cast(BinaryIO, lzma.LZMAFile(raw))
        if suffix == ".zst":
            return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))
        return raw


def find_files(patterns: list[str], records: RecordForm) -> list[LocalFile]:
    """The files that `patterns` (names or globs) match, in the order of the patterns, each glob's sorted by name.

    Raises FileNotFoundError for a pattern that matches no file, ValueError for a folder or a file named twice.
    """
    files: list[LocalFile] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            raise ValueError(f"--text {pattern} is a folder: name its files, for instance '{pattern}/*.txt'")
        found = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        found = [path for path in found if path.is_file()]
        if not found:
            raise FileNotFoundError(f"--text {pattern}: no such file")
        files.extend(LocalFile(path, records) for path in found)
    seen: set[str] = set()
    for name in (str(file.path.resolve()) for file in files):
        if name in seen:
            raise ValueError(f"--text {name} is named twice: leave one out")
        seen.add(name)
    return files


def _lines(start: bytes, file: BinaryIO, raw: BinaryIO, counts: SourceCounts) -> Iterator[str]:
    """Stripped lines, empty ones included, of `start` and what follows it in `file`, which reads from `raw`."""
    rest = start
    while True:
        block = file.read(_BLOCK_BYTES)
        counts.position = raw.tell()
        buffer = rest + block if rest else block
        end = buffer.rfind(b"\n") + 1 if block else len(buffer)
        if end == 0 and len(buffer) > LINE_CHARS:
            end = _cut_inside_line(buffer)
            counts.long_lines_cut += 1
        text, rest = _decode(buffer[:end], counts), buffer[end:]
        if text:
            for line in text.removesuffix("\n").split("\n"):
                yield from short_lines(line.strip(), counts)
        if not block:
            return


def _cut_inside_line(buffer: bytes) -> int:
    """Where to cut a block that holds no line end: after a space, else between two characters."""
    end = buffer.rfind(b" ") + 1
    if end == 0:
        end = len(buffer) - 1
        while end > len(buffer) - 4 and buffer[end] & 0xC0 == 0x80:  # a UTF-8 continuation byte
            end -= 1
    return end


def _decode(raw: bytes, counts: SourceCounts) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="replace")
        counts.invalid_utf8 += text.count(_REPLACEMENT) - raw.count(_REPLACEMENT.encode())
        return text


def _blank_line_separated(lines: Iterator[str], counts: SourceCounts) -> Iterator[str]:
    tally = DocumentTally(counts)
    for line in lines:
        yield from tally.add(line) if line else tally.end()
    yield from tally.end()


def _json_texts(lines: Iterator[str], column: str, counts: SourceCounts) -> Iterator[str | None]:
    for line in lines:
        if line:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            text = record.get(column) if isinstance(record, dict) else None
            if isinstance(text, str) and not _is_encodable(text):  # half of an escaped surrogate pair
                text = text.encode("utf-8", errors="replace").decode()
                counts.invalid_utf8 += 1
            yield text


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_texts(path: Path, records: RecordForm, counts: SourceCounts) -> Iterator[str | None]:
    file = pyarrow.parquet.ParquetFile(path)
    records.check_column(str(path), file.schema_arrow.names)
    size = path.stat().st_size
    read = 0
    for batch in file.iter_batches(batch_size=1024, columns=[records.column]):
        read += len(batch)
        counts.position = size * read // max(1, file.metadata.num_rows)
        yield from batch.column(0).to_pylist()
