"""Finds duplicate lines by a 64-bit hash.

Hashes go to disk, partitioned by their top bits so that each partition can be sorted in memory; the result is one bit
per line. Among n lines, any two different ones share a hash with probability n^2 / 2^65: 0.0004 for 120 million lines.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

_PARTITION_BITS = 6
_LINES_IN_MEMORY = 1 << 18
_HASH_OF_LINE = np.dtype([("hash", "<u8"), ("line", "<u8")])


class DuplicateFinder:
    """Finds the lines of a corpus that repeat an earlier line.

    Takes 16 bytes of disk per line, and memory for one partition (1/64 of that) and one bit per line. The folder is for
    temporary files; it is emptied now and removed at the end.
    """

    def __init__(self, folder: Path) -> None:
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
        records = np.empty(len(self._hashes), dtype=_HASH_OF_LINE)
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
        """uint8, a bit per line: bit n % 8 (from the highest) of byte n // 8 is set if line n repeats another."""
        self._flush()
        bits = np.zeros(-(-self._written // 8), dtype=np.uint8)
        for path in sorted(self._folder.iterdir()):
            records = np.fromfile(path, dtype=_HASH_OF_LINE)
            order = np.argsort(records["hash"], kind="stable")  # equal hashes stay in the order of their lines
            hashes = records["hash"][order]
            repeats = records["line"][order[1:]][hashes[1:] == hashes[:-1]]
            np.bitwise_or.at(bits, repeats >> np.uint64(3), np.uint8(128) >> (repeats & np.uint64(7)).astype(np.uint8))
            path.unlink()
        self._folder.rmdir()
        return bits


def without_duplicates(lines: list[str], first: int, bits: np.ndarray) -> list[str]:
    """`lines`, which begin at line `first` of the corpus, without those whose bit is set."""
    start = first // 8
    flags = np.unpackbits(bits[start : (first + len(lines)) // 8 + 1])[first - start * 8 :][: len(lines)]
    return [line for line, repeats in zip(lines, flags.tolist(), strict=True) if not repeats] if flags.any() else lines
