"""The order of the training rows: an endless stream in which each epoch is a permutation of the table.

Nothing is stored: the row at any position is computed from (seed, position). So a resume needs only the number of rows
consumed, and any number of ranks reads the same stream.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from dwt_ds.data.hashing import hashes, key_of

_FEISTEL_ROUNDS = 8
_ORDER_STREAM = 1
_BLOCK_STREAM = 2
# A window has this many rows of an epoch, which are sorted by length and cut into blocks.
WINDOW_ROWS = 16_384
# Rows of a block, hence of a micro-batch, are in order of length. Most global batches fit into a block, so that the
# ranks, whose micro-batches are side by side in it, have equal work.
BLOCK_ROWS = 256


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
