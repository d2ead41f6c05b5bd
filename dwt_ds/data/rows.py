"""Rows of tokens: where they lie on disk, in which order a run takes them, and the random numbers for order and masks.

The order is an endless stream in which each epoch is a permutation of the table. Nothing is stored: the row at any
position is computed from (seed, position). So a resume needs only the number of rows consumed, and any number of ranks
reads the same stream.

Random numbers are hashes of what a draw is for, instead of a generator with a state. Row order and masks must be the
same on 1 rank or 8, after a resume, and with any other rows in the batch, so every draw is a pure function of its key.
The hash is the output function of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014, figure 15; constants: Stafford's "Mix13").
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:  # worker processes of `dwt-ds prepare` import this module, and do without pydantic
    from dwt_ds.data.manifest import Shard

LENGTHS_NAME = "lengths.npy"
# Columns of the Arrow files. Folders of earlier versions lack the second.
TOKENS, STARTS_WORD = "input_ids", "starts_word"
_FEISTEL_ROUNDS = 8
_ORDER_STREAM = 1
_BLOCK_STREAM = 2
# A window has this many rows of an epoch, which are sorted by length and cut into blocks.
WINDOW_ROWS = 16_384
# Rows of a block, hence of a micro-batch, are in order of length. Most global batches fit into a block, so that the
# ranks, whose micro-batches are side by side in it, have equal work.
BLOCK_ROWS = 256
_WORD = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


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


class RowStream:
    """Rows at positions of the endless stream; position p is in epoch p // size.

    Args:
        size: rows of the table.
        lengths: int32 (size,), to group rows of similar length; None if all rows have one length.
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


def permuted(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """The images of `indices` (int64, each in [0, size)) under the permutation of [0, size) that `key` names.

    A Feistel network of 8 rounds over the smallest power of two that holds `size` (Luby and Rackoff 1988), walked
    until it lands below `size` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 4).
    O(1) memory; fewer than two walks on average.
    """
    if size == 1:
        return np.zeros_like(indices)
    bits = max(2, (size - 1).bit_length())
    images = _feistel(indices.astype(np.uint64), bits, key)
    outside = np.flatnonzero(images >= size)
    while len(outside):
        images[outside] = _feistel(images[outside], bits, key)
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def _feistel(words: np.ndarray, bits: int, key: int) -> np.ndarray:
    left_bits, right_bits = bits - bits // 2, bits // 2
    left = words >> np.uint64(right_bits)
    right = words & np.uint64((1 << right_bits) - 1)
    for round_index in range(_FEISTEL_ROUNDS):
        mixed = hashes(key_of(key, round_index), right) >> np.uint64(64 - left_bits)
        left, right = right, left ^ mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def mix64(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on an array of uint64, any shape but 0-d; returns a new array."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return words ^ (words >> np.uint64(31))


def key_of(*parts: int) -> int:
    """One 64-bit key out of any number of integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = (key + (part + 1) * GOLDEN_GAMMA) & _WORD
        key = ((key ^ (key >> 30)) * _MULTIPLIER_1) & _WORD
        key = ((key ^ (key >> 27)) * _MULTIPLIER_2) & _WORD
        key ^= key >> 31
    return key


def hashes(key: int | np.ndarray, counters: np.ndarray) -> np.ndarray:
    """The `counters`-th words of the stream `key`: uint64, in the broadcast shape of the two.

    `key` is an int or a uint64 array; `counters` a non-negative integer array.
    """
    start = np.uint64(key) if isinstance(key, int) else key
    return mix64(start + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN_GAMMA))


def uniform(words: np.ndarray) -> np.ndarray:
    """uint64 words as float64 in [0, 1), from their top 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))


def below(words: np.ndarray, bound: int) -> np.ndarray:
    """uint64 words as int64 in [0, bound), bound < 2**32: the top 32 bits times bound (Lemire 2019, without rejection).

    The bias is below bound / 2**32.
    """
    return (((words >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)
