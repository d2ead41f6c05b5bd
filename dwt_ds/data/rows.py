"""Rows of tokens: where they lie on disk, and in which order a run takes them.

The order is an endless stream in which each epoch is a permutation of the table. Nothing is stored: the row at any
position is computed from (seed, position). So a resume needs only the number of rows consumed, and any number of ranks
reads the same stream.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa

from dwt_ds.data.manifest import Shard
from dwt_ds.data.row_hashes import key_of, permuted

LENGTHS_NAME = "lengths.npy"
# Columns of the Arrow files. Folders of earlier versions lack the second.
TOKENS, STARTS_WORD = "input_ids", "starts_word"
_ORDER_STREAM = 1
_BLOCK_STREAM = 2
# A window has this many rows of an epoch, which are sorted by length and cut into blocks.
WINDOW_ROWS = 16_384
# Rows of a block, hence of a micro-batch, are in order of length. Most global batches fit into a block, so that the
# ranks, whose micro-batches are side by side in it, have equal work.
BLOCK_ROWS = 256


class RowTable:
    """Rows of token ids in memory-mapped Arrow files, read when they are used. Pickled as paths, without the rows."""

    def __init__(self, folder: Path, shards: list[Shard], pad_id: int, full_width: int | None) -> None:
        """full_width: length of a full row in the packed form, where nearly all rows are full; else None."""
        self.full_width = full_width
        self._folder, self._shards, self._pad_id = folder, shards, pad_id
        self._values: list[np.ndarray] = []
        self._bits: list[np.ndarray] = []
        self._offsets: list[np.ndarray] = []
        counts: list[int] = []
        for shard in shards:
            with pa.memory_map(str(folder.parent / shard.name)) as source:
                for batch in pa.ipc.open_stream(source):
                    column = batch.column(TOKENS)
                    if STARTS_WORD in batch.schema.names:
                        self._bits.append(np.frombuffer(batch.column(STARTS_WORD).values.buffers()[1], dtype=np.uint8))
                    self._values.append(column.values.to_numpy(zero_copy_only=True))
                    self._offsets.append(column.offsets.to_numpy(zero_copy_only=True))
                    counts.append(len(column))
        self.knows_words = len(self._bits) == len(self._values)
        """Whether the folder says where words start."""
        self._first_rows = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        lengths_path = folder / LENGTHS_NAME
        try:
            self.lengths: np.ndarray = np.load(lengths_path, mmap_mode="r" if self._first_rows[-1] else None)
            """int32 (rows,), memory-mapped: tokens of each row."""
        except (EOFError, ValueError) as error:
            raise ValueError(f"{lengths_path} is damaged ({error}); prepare the data again") from None
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
        for out, batch, row, length in zip(input_ids, *self._places(indices), lengths.tolist(), strict=True):
            start, end = self._offsets[batch][row : row + 2].tolist()
            if end - start != length:  # the end of a file that was cut off reads as zeros
                raise OSError(
                    f"{self._folder}: a row has {end - start} tokens, {LENGTHS_NAME} says {length}: the files were "
                    'changed after they were opened; see what "dwt-ds verify" says of the data folder'
                )
            out[:length] = self._values[batch][start:end]
        return input_ids, lengths

    def starts_word(self, indices: np.ndarray, width: int) -> np.ndarray:
        """(B, S) bool: tokens of rows `indices` (B,) that start a word, padding included. Needs `knows_words`."""
        starts = np.ones((len(indices), width), dtype=bool)
        for out, batch, row in zip(starts, *self._places(indices), strict=True):
            first, end = self._offsets[batch][row : row + 2].tolist()
            bits = np.unpackbits(self._bits[batch][first // 8 : -(-end // 8)], bitorder="little")
            out[: end - first] = bits[first % 8 : first % 8 + end - first]
        return starts

    def _places(self, indices: np.ndarray) -> tuple[list[int], list[int]]:
        """(record batch of each of the rows, number of the row in that batch)"""
        batches = np.searchsorted(self._first_rows, indices, side="right") - 1
        return batches.tolist(), (indices - self._first_rows[batches]).tolist()


class RowStream:
    """Rows at positions of the endless stream; position p is in epoch p // size, `size` being the rows of the table.

    With `lengths` (size,) int32, rows of similar length are grouped; None: all have one length.
    """

    def __init__(self, size: int, seed: int, lengths: np.ndarray | None = None) -> None:
        self.size = size
        self.seed = seed
        self.lengths = lengths
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rows, epochs), both int64 and shaped like `positions` (int64, 1-d)."""
        epochs = positions // self.size
        within = positions - epochs * self.size
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            rows[of_epoch] = self._rows_of_epoch(within[of_epoch], epoch)
        return rows, epochs

    def _rows_of_epoch(self, within: np.ndarray, epoch: int) -> np.ndarray:
        if self.lengths is None:
            return permuted(within, self.size, key_of(_ORDER_STREAM, self.seed, epoch))
        rows = np.empty_like(within)
        windows = within // WINDOW_ROWS
        for window in np.unique(windows).tolist():
            here = windows == window
            rows[here] = self._window(epoch, window)[within[here] - window * WINDOW_ROWS]
        return rows

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Rows of one window, int64: sorted by length, cut into blocks, the blocks in random order."""
        known = self._windows.get((epoch, window))
        if known is not None:
            return known
        assert self.lengths is not None
        start = window * WINDOW_ROWS
        within = np.arange(start, min(start + WINDOW_ROWS, self.size))
        rows = permuted(within, self.size, key_of(_ORDER_STREAM, self.seed, epoch))
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        blocks = -(-len(rows) // BLOCK_ROWS)
        order = permuted(np.arange(blocks), blocks, key_of(_BLOCK_STREAM, self.seed, epoch, window))
        rows = np.concatenate([rows[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS] for block in order.tolist()])
        self._windows[epoch, window] = rows
        while len(self._windows) > 2:
            self._windows.popitem(last=False)
        return rows
