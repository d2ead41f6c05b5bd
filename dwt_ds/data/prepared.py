"""Reads a prepared data folder: memory-mapped rows, their lengths, the tokenizer, the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dwt_ds.base.files import changed_files
from dwt_ds.base.words import one_line
from dwt_ds.data.manifest import PACKED, Manifest, Shard, read_data_manifest
from dwt_ds.data.tokenizer import TokenizerFacts, tokenizer_sha256

TRAIN, VALIDATION = "train", "validation"
LENGTHS_NAME = "lengths.npy"
# Columns of the Arrow files. Folders of earlier versions lack the second.
TOKENS, STARTS_WORD = "input_ids", "starts_word"
TOKENIZER_FOLDER = "tokenizer"


class RowTable:
    """Rows of token ids in memory-mapped Arrow files, read when they are used. Pickles as paths."""

    def __init__(self, folder: Path, shards: list[Shard], pad_id: int, full_width: int | None) -> None:
        """full_width: length of a full row in the packed form, where nearly all rows are full; else None."""
        self.full_width = full_width
        self._folder = folder
        self._shards = shards
        self._pad_id = pad_id
        self._open()

    def _open(self) -> None:
        values: list[np.ndarray] = []
        bits: list[np.ndarray] = []
        offsets: list[np.ndarray] = []
        counts: list[int] = []
        for shard in self._shards:
            path = self._folder.parent / shard.name
            with pa.memory_map(str(path)) as source:
                for batch in pa.ipc.open_stream(source):
                    column = batch.column(TOKENS)
                    if STARTS_WORD in batch.schema.names:
                        bits.append(np.frombuffer(batch.column(STARTS_WORD).values.buffers()[1], dtype=np.uint8))
                    values.append(column.values.to_numpy(zero_copy_only=True))
                    offsets.append(column.offsets.to_numpy(zero_copy_only=True))
                    counts.append(len(column))
        self._values, self._offsets = values, offsets
        self.knows_words = len(bits) == len(values)
        """Whether the folder says where words start."""
        self._bits = bits
        self._first_rows = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        lengths_path = self._folder / LENGTHS_NAME
        self.lengths: np.ndarray = np.load(lengths_path, mmap_mode="r" if self._first_rows[-1] else None)
        """int32 (rows,), memory-mapped: tokens of each row."""
        if len(self.lengths) != self._first_rows[-1]:
            raise ValueError(f"{lengths_path} has {len(self.lengths)} rows, the Arrow files {self._first_rows[-1]}")

    def __reduce__(self) -> tuple[type[RowTable], tuple[Path, list[Shard], int, int | None]]:
        return RowTable, (self._folder, self._shards, self._pad_id, self.full_width)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def check_lengths(self) -> None:
        """Raises ValueError if the stored lengths are not those of the rows in the Arrow files."""
        for first, offsets in zip(self._first_rows.tolist(), self._offsets, strict=False):
            if not np.array_equal(self.lengths[first : first + len(offsets) - 1], np.diff(offsets)):
                raise ValueError(f"{self._folder / LENGTHS_NAME} does not fit the rows in the Arrow files")

    def rows(self, indices: np.ndarray, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids (B, S) int64 padded with the pad id, lengths (B,) int64) of rows `indices` (B,).

        S is `width`, or the longest of these rows.
        """
        lengths = self.lengths[indices].astype(np.int64)
        if width is None:
            width = int(lengths.max(initial=0))
        input_ids = np.full((len(indices), width), self._pad_id, dtype=np.int64)
        batches = np.searchsorted(self._first_rows, indices, side="right") - 1
        within = indices - self._first_rows[batches]
        for out, batch, row, length in zip(input_ids, batches.tolist(), within.tolist(), lengths.tolist(), strict=True):
            start = self._offsets[batch][row]
            out[:length] = self._values[batch][start : start + length]
        return input_ids, lengths

    def starts_word(self, indices: np.ndarray, width: int) -> np.ndarray:
        """(B, S) bool: tokens of rows `indices` (B,) that start a word, padding included. Needs `knows_words`."""
        starts = np.ones((len(indices), width), dtype=bool)
        batches = np.searchsorted(self._first_rows, indices, side="right") - 1
        within = indices - self._first_rows[batches]
        for out, batch, row in zip(starts, batches.tolist(), within.tolist(), strict=True):
            first, end = self._offsets[batch][row : row + 2].tolist()
            bits = np.unpackbits(self._bits[batch][first // 8 : -(-end // 8)], bitorder="little")
            out[: end - first] = bits[first % 8 : first % 8 + end - first]
        return starts


@dataclass(frozen=True)
class PreparedData:
    """A finished data folder."""

    folder: Path
    manifest: Manifest
    train: RowTable
    validation: RowTable

    @classmethod
    def open(cls, folder: str | Path) -> PreparedData:
        """Open a folder that `dwt-ds prepare` finished.

        Raises FileNotFoundError or ValueError of one line, with the fix, for a folder that is missing, empty,
        half-written, of another version, or whose files are not as long as the manifest says.
        """
        folder = Path(folder).expanduser()
        manifest = read_data_manifest(folder)
        for shard in manifest.shards:
            path = folder / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "missing" if size is None else f"{size} bytes long"
                raise ValueError(
                    f"{path} is {found}, the manifest says {shard.bytes} bytes: the folder is damaged; "
                    f'remove it and run "dwt-ds prepare ... --out {folder}" again'
                )
        pad_id = int(manifest.settings["pad_id"])
        full_width = manifest.seq_len if manifest.form == PACKED else None

        def table(split: str) -> RowTable:
            shards = [shard for shard in manifest.shards if shard.name.startswith(split + "/")]
            return RowTable(folder / split, shards, pad_id, full_width)

        return cls(folder, manifest, table(TRAIN), table(VALIDATION))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the rows."""
        return AutoTokenizer.from_pretrained(self.folder / TOKENIZER_FOLDER)

    @cached_property
    def facts(self) -> TokenizerFacts:
        return TokenizerFacts.of(self.tokenizer())

    def check_tokenizer(self) -> None:
        """Raises ValueError if the tokenizer is no longer the one that made the rows."""
        where = self.folder / TOKENIZER_FOLDER
        try:
            digest = tokenizer_sha256(self.tokenizer())
        except Exception as error:  # the tokenizers library raises plain Exceptions
            raise ValueError(f"{where} cannot be loaded ({one_line(error, with_type=True)})") from error
        if digest != self.manifest.tokenizer_sha256:
            raise ValueError(f"{where}: sha256 is {digest}, the manifest says {self.manifest.tokenizer_sha256}")


def data_problems(folder: Path) -> list[str]:
    """One line for each thing in a data folder that has changed since it was written; empty if nothing has.

    Checks the Arrow files against their checksums, the row lengths against the Arrow files, and the tokenizer against
    its fingerprint.
    """
    try:
        manifest = read_data_manifest(folder)
        shards = {shard.name: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in manifest.shards}
        found = changed_files(folder, shards)
        if found:
            return found
        data = PreparedData.open(folder)
    except (OSError, EOFError, ValueError) as error:
        return [str(error)]
    for check in (data.train.check_lengths, data.validation.check_lengths, data.check_tokenizer):
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    return found
