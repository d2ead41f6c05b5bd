"""Options of `dwt-ds prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PositiveInt, SkipValidation
from pydantic.dataclasses import dataclass

from dwt_ds.config.schema import Seed
from dwt_ds.data.manifest import ONE_SENTENCE_PER_ROW, PACKED
from dwt_ds.prepare.case_and_accents import Wishes
from dwt_ds.prepare.sources import Source
from dwt_ds.prepare.train_tokenizer import Kind

_AtLeast1 = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class PrepareOptions:
    """All options, checked. Raises pydantic's ValidationError (a ValueError) for invalid values."""

    sources: SkipValidation[Sequence[Source]]
    out: Path
    """The data folder to make."""
    tokenizer: str | None = None
    """A vocab.txt, the folder of a tokenizer or of prepared data, or a name on the Hugging Face hub."""
    train_tokenizer: PositiveInt | None = None
    """Instead of `tokenizer`: entries of a tokenizer trained on the sources."""
    kind: Kind = "wordpiece"
    """Kind of the tokenizer to train."""
    cased: bool | None = None
    """Keep capitals. None: as in the entries of a vocab.txt, or as usual for the kind that is trained."""
    keep_accents: bool | None = None
    """None: as in the entries of a vocab.txt, or as the training text needs."""
    seq_len: Annotated[int, Field(ge=8)] = 128
    """Tokens of a row."""
    every: _AtLeast1 = 1
    """Take one of every so many sentences."""
    one_sentence_per_row: bool = False
    join_documents: bool = True
    """In the packed form: rows may hold the end of one document and the start of the next."""
    min_chars: _AtLeast1 = 10
    max_chars: _AtLeast1 = 2000
    """Shorter sentences are dropped, longer ones cut (characters)."""
    drop_long: bool = False
    """Drop longer sentences rather than cut them."""
    keep_duplicates: bool = False
    """Keep lines that repeat an earlier line."""
    validation: Annotated[float, Field(ge=0, lt=0.5)] = 0.01
    """Share of the documents that is held out; of the text, where documents are too long for that."""
    seed: Seed = 0
    allow_unknown: bool = False
    """Accept a tokenizer that does not know a fifth of the text; never changes the result."""
    workers: _AtLeast1 = 1
    """Processes; never changes the result."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("nothing to read: give --text FILE, --dataset NAME or --docs")
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError("give either --tokenizer VOCAB_OR_NAME or --train-tokenizer N")
        if self.tokenizer is not None and self.kind != "wordpiece":
            raise ValueError(f"--kind={self.kind}: goes with --train-tokenizer N, not with --tokenizer")
        if self.max_chars < self.min_chars:
            raise ValueError(f"--max-chars={self.max_chars}: must be at least --min-chars, {self.min_chars}")

    @property
    def wishes(self) -> Wishes:
        return Wishes(self.cased, self.keep_accents)

    @property
    def form(self) -> str:
        return ONE_SENTENCE_PER_ROW if self.one_sentence_per_row else PACKED

    def identity(self) -> dict[str, Any]:
        """Everything the rows depend on, as JSON values; equal identities make equal rows.

        Options of later versions are included only if they are not at their defaults, so that folders made before still
        count as finished.
        """
        later: dict[str, Any] = {} if self.kind == "wordpiece" else {"kind": self.kind}
        if self.keep_accents is not None:
            later["keep_accents"] = self.keep_accents
        if self.drop_long:
            later["drop_long"] = True
        return later | {
            "tokenizer": self.tokenizer or f"trained here, {self.train_tokenizer} entries",
            "cased": self.kind != "wordpiece" if self.cased is None else self.cased,
            "seq_len": self.seq_len,
            "every": self.every,
            "form": self.form,
            "join_documents": self.join_documents,
            "min_chars": self.min_chars,
            "max_chars": self.max_chars,
            "keep_duplicates": self.keep_duplicates,
            "validation": self.validation,
            "seed": self.seed,
            "sources": [source.identity() for source in self.sources],
        }
