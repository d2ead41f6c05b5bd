"""Lines that were there before: found exactly (up to a 64-bit hash), in memory that does not grow with the corpus.

Hashes go to disk in partitions by their top bits, each small enough to sort in memory by itself; what comes out is
one bit a line. Two different lines share a hash with a chance of n^2 / 2^65 among n lines: 0.0004 among 120 million.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

_PARTITION_BITS = 6
_LINES_IN_MEMORY = 1 << 18
_RECORD = np.dtype([("hash", "<u8"), ("line", "<u8")])


class DuplicateFinder:
    """Takes the lines of a corpus in order and tells which of them repeat an earlier one.

    Disk: 16 bytes a line while it works. Memory: that of one partition (1/64 of these) and a bit a line.
    """

    def __init__(self, folder: Path) -> None:
        """folder: an empty one that may be filled, and is emptied at the end."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.iterdir():
            leftover.unlink()
        self._hashes: list[int] = []
        self._written = 0

    def add(self, lines: list[str]) -> None:
        self._hashes.extend(xxhash.xxh3_64_intdigest(line.encode()) for line in lines)
        if len(self._hashes) >= _LINES_IN_MEMORY:
            self._flush()

    def _flush(self) -> None:
        records = np.empty(len(self._hashes), dtype=_RECORD)
        records["hash"] = np.array(self._hashes, dtype=np.uint64)
        records["line"] = np.arange(self._written, self._written + len(records))
        partitions = (records["hash"] >> np.uint64(64 - _PARTITION_BITS)).astype(np.int64)
        records = records[np.argsort(partitions, kind="stable")]
        counts = np.bincount(partitions, minlength=1 << _PARTITION_BITS)
        for partition, of_partition in enumerate(np.split(records, np.cumsum(counts)[:-1])):
            with open(self._folder / f"{partition:02d}", "ab") as file:
                file.write(of_partition.tobytes())
        self._written += len(self._hashes)
        self._hashes = []

    def finish(self) -> np.ndarray:
        """uint8, a bit a line: bit n % 8 (from the highest) of byte n // 8 is set where line n is a repeat."""
        self._flush()
        bits = np.zeros(-(-self._written // 8), dtype=np.uint8)
        for path in sorted(self._folder.iterdir()):
            records = np.fromfile(path, dtype=_RECORD)
            order = np.argsort(records["hash"], kind="stable")  # equal hashes stay in the order of their lines
            hashes = records["hash"][order]
            repeats = records["line"][order[1:]][hashes[1:] == hashes[:-1]]
            np.bitwise_or.at(bits, repeats >> np.uint64(3), np.uint8(128) >> (repeats & np.uint64(7)).astype(np.uint8))
            path.unlink()
        self._folder.rmdir()
        return bits


def without_duplicates(lines: list[str], first: int, bits: np.ndarray) -> list[str]:
    """`lines`, which are lines `first` and following of the corpus, less those whose bit is set."""
    start = first // 8
    flags = np.unpackbits(bits[start : (first + len(lines)) // 8 + 1])[first - start * 8 :][: len(lines)]
    return [line for line, repeats in zip(lines, flags.tolist(), strict=True) if not repeats] if flags.any() else lines
