"""Rows into Arrow files that `datasets` reads and training memory-maps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from dwt_ds.data.atomic import atomic_file
from dwt_ds.data.manifest import Shard
from dwt_ds.data.packing import Rows
from dwt_ds.data.prepared import LENGTHS_NAME, file_sha256

# Tokens of a shard, about: 128 MB of 16-bit ids.
SHARD_TOKENS = 64 * 1024 * 1024


class ShardWriter:
    """Writes the rows of one split (`folder`) as Arrow stream files of about SHARD_TOKENS tokens each, and beside them
    the rows' lengths, so that a reader has them without touching the tokens."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kind = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._features = datasets.Features({"input_ids": datasets.List(datasets.Value(kind))})
        self._folder = folder
        self._shard_tokens = shard_tokens
        self._content = hashlib.sha256()
        self._lengths: list[np.ndarray] = []

    def write(self, parts: Iterable[Rows]) -> list[Shard]:
        """Store all `parts`; one record batch a part. Returns the shards in order, names relative to the data folder."""
        groups: list[Path] = []
        rows_of: list[int] = []
        waiting: list[Rows] = []
        tokens = 0
        for part in parts:
            if len(part.lengths) == 0:
                continue
            waiting.append(part)
            tokens += len(part.tokens)
            if tokens >= self._shard_tokens:
                groups.append(self._write_shard(len(groups), waiting))
                rows_of.append(sum(len(rows.lengths) for rows in waiting))
                waiting, tokens = [], 0
        if waiting:
            groups.append(self._write_shard(len(groups), waiting))
            rows_of.append(sum(len(rows.lengths) for rows in waiting))
        named = []
        for number, path in enumerate(groups):
            final = path.with_name(f"data-{number:05d}-of-{len(groups):05d}.arrow")
            path.rename(final)
            named.append(final)
        self._write_lengths()
        self._describe(named)
        return [
            Shard(f"{self._folder.name}/{path.name}", rows, path.stat().st_size, file_sha256(path))
            for path, rows in zip(named, rows_of)
        ]

    def content_sha256(self) -> str:
        """sha256 over the tokens and lengths written, in order: the same whatever the Arrow version."""
        return self._content.hexdigest()

    def _write_shard(self, number: int, parts: list[Rows]) -> Path:
        path = self._folder / f"data-{number:05d}.arrow"
        schema = self._features.arrow_schema
        with atomic_file(path) as file, pa.ipc.new_stream(file, schema) as writer:
            for part in parts:
                offsets = np.zeros(len(part.lengths) + 1, dtype=np.int32)
                np.cumsum(part.lengths, out=offsets[1:])
                column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(part.tokens))
                writer.write_batch(pa.record_batch([column], schema=schema))
                self._content.update(part.tokens.astype("<u4").tobytes())
                self._content.update(part.lengths.astype("<i4").tobytes())
                self._lengths.append(part.lengths)
        return path

    def _write_lengths(self) -> None:
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, dtype=np.int32)
        with atomic_file(self._folder / LENGTHS_NAME) as file:
            np.save(file, lengths)

    def _describe(self, shards: list[Path]) -> None:
        """The two small files with which `datasets.load_from_disk` opens the folder."""
        datasets.DatasetInfo(features=self._features).write_to_directory(str(self._folder))
        state = {
            "_data_files": [{"filename": path.name} for path in shards],
            "_fingerprint": self.content_sha256()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": self._folder.name,
        }
        with atomic_file(self._folder / "state.json") as file:
            file.write(json.dumps(state, indent=2).encode())
