"""A split of a task as it was really read: its rows, and what it may be called."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets

from dwt_ds.glue.tasks import OfficialSplit

# Columns of every `Split.rows`; SECOND only where a task has two sentences.
FIRST, SECOND, LABEL = "first", "second", "labels"


@dataclass(frozen=True)
class Split:
    """Rows of one file or of one split on the hub."""

    split: str
    file: str
    """Name of the file, or of the split on the hub."""
    rows: datasets.Dataset
    """Columns FIRST, SECOND (for pairs), LABEL: class number, or score."""
    official: OfficialSplit | None
    """What this could be, going by its name; None for a name that is not GLUE's."""
    left_out: int = 0
    """Spoiled rows of the file that were not taken."""

    @property
    def is_official(self) -> bool:
        """Whether it has the official name and the official number of rows. Only then is it GLUE's own split."""
        return self.official is not None and len(self.rows) == self.official.rows

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the rows."""
        digest = hashlib.sha256()
        for batch in self.rows.iter(batch_size=1000):
            digest.update(repr(batch).encode())
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """What results and their comparison need to know about it."""
        return {
            "split": self.split,
            "file": self.file,
            "rows": len(self.rows),
            "left_out": self.left_out,
            "is_official": self.is_official,
            "identity": self.identity,
        }


@dataclass(frozen=True)
class TaskData:
    """What a task is trained and scored on."""

    train: Split
    validation: tuple[Split, ...]
