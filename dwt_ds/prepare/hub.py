"""Datasets of the Hugging Face hub, or in its formats, as sources of documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from glob import has_magic
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from dwt_ds.base.words import one_line
from dwt_ds.prepare.encoding import UTF_8
from dwt_ds.prepare.records import column_texts
from dwt_ds.prepare.sources import RecordForm, SourceCounts

_RECORDS_A_READ = 1000


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset. `datasets` 5 reads parquet, json, csv, text and Arrow ones; script datasets no longer."""

    dataset: str
    """A name on the hub, or a local folder (of data files, or of `Dataset.save_to_disk`)."""
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    """Read over the network as it is used, twice, rather than stored first."""
    records: RecordForm = RecordForm()
    encoding: str = UTF_8
    """Of columns of bytes, and of strings that are not UTF-8."""

    @classmethod
    def parse(cls, text: str, streaming: bool, records: RecordForm, encoding: str = UTF_8) -> HubDataset:
        """NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (an empty CONFIG is the default one)."""
        name, config, split, *rest = *text.split(":"), "", ""
        if not name or len(rest) > 2 or any(rest):
            raise ValueError(f"--dataset {text}: write NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
        return cls(name, config or None, split or "train", streaming, records, encoding)

    @property
    def name(self) -> str:
        return ":".join([self.dataset, self.config or "", self.split])

    @property
    def size(self) -> int:
        """Records; 0 for a stream."""
        return 0 if self.streaming else len(self._loaded)

    @property
    def unit(self) -> str:
        return "records"

    def identity(self) -> dict[str, Any]:
        changed = self.records.changed() | ({} if self.encoding == UTF_8 else {"encoding": self.encoding})
        content = {} if self.streaming else {"records": len(self._loaded), "fingerprint": self._loaded._fingerprint}
        return {"dataset": self.dataset, "config": self.config, "split": self.split, **content, **changed}

    @cached_property
    def _loaded(self) -> Any:
        folder = Path(self.dataset).resolve()
        if folder.is_dir() and (has_magic(str(folder)) or "::" in str(folder)):
            raise ValueError(
                f"--dataset {self.name}: the library `datasets` takes [ ] * ? and :: in {folder} for a pattern, and "
                "would read other folders; rename it"
            )
        try:
            if Path(self.dataset, "state.json").is_file():
                loaded = datasets.load_from_disk(self.dataset)
            else:
                loaded = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:  # the library raises errors of many kinds, its network layers' included
            raise ValueError(f"--dataset {self.name} cannot be loaded: {one_line(error)}") from None
        self.records.check_column(f"dataset {self.name}", list(loaded.column_names or [self.records.column]))
        return loaded.select_columns([self.records.column])

    def documents(self, counts: SourceCounts) -> Iterator[str]:
        texts = column_texts(self._columns(counts), self.records.column, self.encoding, f"dataset {self.name}", counts)
        return self.records.documents(texts, counts)

    def _columns(self, counts: SourceCounts) -> Iterator[pa.ChunkedArray]:
        batches = self._loaded.with_format("arrow").iter(batch_size=_RECORDS_A_READ)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # a damaged file or the network: as many kinds as above
                raise ValueError(f"--dataset {self.name} cannot be read: {one_line(error)}") from None
            if batch is None:
                return
            counts.position += len(batch)
            yield batch[self.records.column]
