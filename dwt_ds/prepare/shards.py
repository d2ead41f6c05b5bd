"""Writes rows to Arrow files, which `datasets` reads and training memory-maps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from dwt_ds.base.files import atomic_file, file_sha256, write_json
from dwt_ds.data.manifest import Shard
from dwt_ds.data.rows import LENGTHS_NAME, STARTS_WORD, TOKENS
from dwt_ds.prepare.packing import Rows

# A shard is closed at each multiple of this many tokens: 128 MB of 16-bit ids.
SHARD_TOKENS = 64 * 1024 * 1024


class ShardWriter:
    """Writes one split to a folder: Arrow stream files, a file with the lengths of the rows (so that a reader need not
    read the tokens for them), and the two files that `datasets.load_from_disk` needs."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.iterdir():
            leftover.unlink()
        kind = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._features = datasets.Features(
            {TOKENS: datasets.List(datasets.Value(kind)), STARTS_WORD: datasets.List(datasets.Value("bool"))}
        )
        self._folder = folder
        self._content = hashlib.sha256()
        self.tokens = 0

    def write(self, parts: Iterable[Rows], rows: int) -> list[Shard]:
        """Write `parts`, each as a record batch, with `rows` rows in all; returns the shards."""
        unnamed: list[tuple[Path, int]] = []
        with atomic_file(self._folder / LENGTHS_NAME) as lengths:
            header = {"descr": "<i4", "fortran_order": False, "shape": (rows,)}
            np.lib.format.write_array_header_1_0(lengths, header)
            filled = (part for part in parts if len(part.lengths))
            # `groupby` asks for the key of a part once the part before it is written.
            for _, group in groupby(filled, key=lambda _: self.tokens // SHARD_TOKENS):
                path = self._folder / f"data-{len(unnamed):05d}.arrow"
                written = 0
                with atomic_file(path) as file, pa.ipc.new_stream(file, self._features.arrow_schema) as arrow:
                    for part in group:
                        arrow.write_batch(self._record_batch(part))
                        lengths.write(part.lengths.astype("<i4").tobytes())
                        written += len(part.lengths)
                unnamed.append((path, written))
        shards = []
        for number, (path, written) in enumerate(unnamed):
            final = path.rename(self._folder / f"data-{number:05d}-of-{len(unnamed):05d}.arrow")
            name = f"{self._folder.name}/{final.name}"
            shards.append(Shard(name, written, final.stat().st_size, file_sha256(final)))
        self._describe([Path(shard.name).name for shard in shards])
        return shards

    def content_sha256(self) -> str:
        """sha256 over the tokens and lengths written, in order: the same whatever the Arrow version."""
        return self._content.hexdigest()

    def _record_batch(self, part: Rows) -> pa.RecordBatch:
        offsets = np.zeros(len(part.lengths) + 1, dtype=np.int32)
        np.cumsum(part.lengths, out=offsets[1:])
        self._content.update(part.tokens.astype("<u4").tobytes())
        self._content.update(part.lengths.astype("<i4").tobytes())
        self.tokens += len(part.tokens)
        columns = [
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)) for values in (part.tokens, part.starts_word)
        ]
        return pa.record_batch(columns, schema=self._features.arrow_schema)

    def _describe(self, names: list[str]) -> None:
        """The two small files with which `datasets.load_from_disk` opens the folder."""
        datasets.DatasetInfo(features=self._features).write_to_directory(str(self._folder))
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": self.content_sha256()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": self._folder.name,
        }
        write_json(self._folder / "state.json", state)
