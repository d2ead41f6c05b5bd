"""The manifest of a data folder: what is in it, where it came from, and the settings it was made with."""

from __future__ import annotations

import json
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from dwt_ds.base.files import MANIFEST
from dwt_ds.config.validate import validated

# The manifest as a table for people.
MANIFEST_TABLE_NAME = "manifest.txt"
# `prepare` writes into this folder inside the output folder until everything is finished.
UNFINISHED_NAME = "unfinished"
# Increased when folders of the previous layout can no longer be read.
FORMAT_VERSION = 1
PACKED = "packed"
ONE_SENTENCE_PER_ROW = "one_sentence_per_row"
_STRICT = ConfigDict(extra="forbid")


@dataclass(config=_STRICT)
class Shard:
    """One Arrow file."""

    name: str
    """Path inside the data folder."""
    rows: int
    bytes: int
    sha256: str


@dataclass(config=_STRICT)
class Manifest:
    """Counts are over everything prepared, training and validation together, unless the name says otherwise."""

    documents: int
    validation_documents: int
    sentences_seen: int
    """Sentences the splitter found, in lines that are no duplicates."""
    sentences_kept: int
    """Sentences that passed the filters and were taken by `every`."""
    tokens: int
    """Tokens in all rows, [CLS] and [SEP] included, padding not."""
    rows: int
    """Training rows."""
    validation_rows: int
    padding_share: float
    """Share of padding if all training rows are padded to seq_len."""
    form: str
    """"packed" or "one_sentence_per_row"."""
    seq_len: int
    vocab_size: int
    tokenizer_sha256: str
    fingerprint: str
    """sha256 over everything that defines the rows: their tokens in order, form, seq_len and tokenizer."""
    seed: int
    every: int
    settings: dict[str, Any] = field(default_factory=dict)
    """All other options that the rows depend on."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """One entry a source, in order: what it is, its size, documents, and what was skipped in it."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Why text was left out or altered, with counts."""
    versions: dict[str, str] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    characters_seen: int = 0
    """Characters of `sentences_seen`, without the spaces between sentences."""
    characters_kept: int = 0
    """Characters of `sentences_kept` that are in rows."""
    dropped_characters: dict[str, int] = field(default_factory=dict)
    """Characters of the reasons of `dropped` by which text was left out."""
    unknown_share: float | None = None
    """Share of the text's tokens that are the unknown token; None in a folder of an earlier version. `sources` has it
    for each source."""
    unknown_characters: dict[str, int] = field(default_factory=dict)
    """The most frequent characters of words that became the unknown token, in a sample of the sentences."""
    held_out_instead: bool = False
    """Whether another document is held out because all text of the first held-out ones was dropped."""
    case_and_accents: str = ""
    """What the tokenizer does with capitals and accents, in words; "" in a folder of an earlier version."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError for anything but a manifest of this version."""
        values = json.loads(text)
        if not isinstance(values, dict) or "format_version" not in values:
            raise ValueError("not a manifest of dwt-ds prepare")
        if values["format_version"] != FORMAT_VERSION:
            raise ValueError(f"data format {values['format_version']}, this version reads format {FORMAT_VERSION}")
        return validated(cls, values)


def read_data_manifest(folder: Path) -> Manifest:
    """Manifest of a data folder (`dwt_ds.base.files.read_manifest` reads those of checkpoints and exports).

    Raises FileNotFoundError if there is no data folder or no manifest, ValueError if the manifest is damaged.
    """
    fix = f'run "dwt-ds prepare ... --out {folder}"'
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist: {fix}")
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / UNFINISHED_NAME).is_dir():
            raise FileNotFoundError(f"data folder {folder} is half-written: {fix} with the same options to finish it")
        state = "is empty" if not any(folder.iterdir()) else f"has no {MANIFEST}"
        raise FileNotFoundError(f"data folder {folder} {state}: {fix}")
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {fix} into a new folder") from None
