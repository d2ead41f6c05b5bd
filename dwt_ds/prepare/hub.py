"""Datasets that `datasets` reads, from the Hugging Face hub or a local folder, as sources of documents."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from glob import has_magic
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from dwt_ds.base.words import one_line
from dwt_ds.prepare.records import column_texts
from dwt_ds.prepare.sources import SourceCounts, TextForm

_RECORDS_A_READ = 1000


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset: parquet, json, csv, text or Arrow. `datasets` 5 no longer runs dataset scripts."""

    dataset: str
    """A name on the hub, or a local folder (of data files, or of `Dataset.save_to_disk`)."""
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    """Read it over the network, twice, instead of storing it first."""
    form: TextForm = TextForm()
    unit: ClassVar[str] = "records"

    @classmethod
    def parse(cls, text: str, streaming: bool, form: TextForm) -> HubDataset:
        """NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (an empty CONFIG is the default one)."""
        name, config, split, *rest = *text.split(":"), "", ""
        if not name or len(rest) > 2 or any(rest):
            raise ValueError(f"--dataset {text}: write NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
        return cls(os.path.expanduser(name), config or None, split or "train", streaming, form)

    @property
    def name(self) -> str:
        return ":".join([self.dataset, self.config or "", self.split])

    @property
    def size(self) -> int:
        """Records; 0 for a stream."""
        return 0 if self.streaming else len(self._loaded)

    def identity(self) -> dict[str, Any]:
        content = {} if self.streaming else {"records": len(self._loaded), "fingerprint": self._loaded._fingerprint}
        return {"dataset": self.dataset, "config": self.config, "split": self.split, **content, **self.form.changed()}

    @cached_property
    def _loaded(self) -> Any:
        folder = Path(self.dataset).resolve()
        if folder.is_dir() and (has_magic(str(folder)) or "::" in str(folder)):
            raise ValueError(
                f"--dataset {self.name}: the library `datasets` takes [ ] * ? and :: in {folder} for a pattern, and "
                "would read other folders; rename it"
            )
        # By its name alone, a folder called `text` or `csv` would be one of the library's readers, which reads all
        # files of the current folder.
        if self.dataset in _PACKAGED_DATASETS_MODULES and not folder.is_dir():
            raise ValueError(f"--dataset {self.name}: there is no such folder, nor such a dataset; correct the path")
        try:
            if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
                loaded = self._split_of(datasets.load_from_disk(folder))
            else:
                name = str(folder) if folder.is_dir() else self.dataset
                loaded = datasets.load_dataset(name, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:  # the library raises errors of many kinds, its network layers' included
            # For a damaged file, or one in another encoding, it says only that an error occurred.
            cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
            raise ValueError(
                f"--dataset {self.name} cannot be loaded: {one_line(cause or error)}; "
                "check the name, the files and the network"
            ) from None
        self.form.check_column(f"dataset {self.name}", list(loaded.column_names or [self.form.column]))
        return loaded.select_columns([self.form.column])

    def _split_of(self, saved: datasets.Dataset | datasets.DatasetDict) -> datasets.Dataset:
        """The split of what `save_to_disk` wrote; one that was saved alone is also found under the default name."""
        splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved, str(saved.split): saved}
        if self.split not in splits:
            raise ValueError(f"it has no split {self.split} (but {', '.join(splits)})")
        return splits[self.split]

    def documents(self, counts: SourceCounts) -> Iterator[str]:
        texts = column_texts(self._columns(counts), self.form, f"dataset {self.name}", counts)
        return self.form.documents(texts, counts)

    def _columns(self, counts: SourceCounts) -> Iterator[pa.ChunkedArray]:
        loaded = self._loaded
        try:
            for batch in loaded.with_format("arrow").iter(batch_size=_RECORDS_A_READ):
                counts.position += len(batch)
                yield batch[self.form.column]
        except Exception as error:  # a damaged file or the network: as many kinds as above
            raise ValueError(
                f"--dataset {self.name} cannot be read: {one_line(error)}; check its files and the network"
            ) from None
