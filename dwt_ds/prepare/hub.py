"""Documents out of datasets on the Hugging Face hub, or in a local folder that `datasets` can read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from dwt_ds.prepare.reading import RecordForm, SourceCounts, check_column, documents_of_records

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

    @classmethod
    def parse(cls, text: str, streaming: bool, records: RecordForm) -> HubDataset:
        """NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (an empty CONFIG is the default one)."""
        name, config, split, *rest = *text.split(":"), "", ""
        if not name or len(rest) > 2 or any(rest):
            raise ValueError(f"--dataset {text}: write NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
        return cls(name, config or None, split or "train", streaming, records)

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
        content = {} if self.streaming else {"records": len(self._loaded), "fingerprint": self._loaded._fingerprint}
        return {"dataset": self.dataset, "config": self.config, "split": self.split, **content}

    @cached_property
    def _loaded(self) -> Any:
        try:
            if Path(self.dataset, "state.json").is_file():
                loaded = datasets.load_from_disk(self.dataset)
            else:
                loaded = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:  # the library raises errors of many kinds, its network layers' included
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"--dataset {self.name} cannot be loaded: {reason}") from None
        check_column(f"dataset {self.name}", self.records.column, list(loaded.column_names or [self.records.column]))
        return loaded.select_columns([self.records.column])

    def documents(self, counts: SourceCounts) -> Iterator[str]:
        return documents_of_records(self._texts(counts), self.records, counts)

    def _texts(self, counts: SourceCounts) -> Iterator[str | None]:
        for batch in self._loaded.iter(batch_size=_RECORDS_A_READ):
            texts = batch[self.records.column]
            counts.position += len(texts)
            yield from texts
