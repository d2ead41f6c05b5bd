"""Opens and checks a prepared data folder: its rows, the tokenizer, the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dwt_ds.base.files import changed_files
from dwt_ds.data.manifest import PACKED, Manifest, read_data_manifest
from dwt_ds.data.rows import RowTable
from dwt_ds.data.tokenizer import TokenizerFacts, load_tokenizer, tokenizer_sha256

TRAIN, VALIDATION = "train", "validation"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class PreparedData:
    """A finished data folder."""

    folder: Path
    manifest: Manifest
    train: RowTable
    validation: RowTable

    @classmethod
    def open(cls, folder: str | Path) -> PreparedData:
        """Open a folder that `dwt-ds prepare` finished.

        Raises FileNotFoundError or ValueError of one line, with the fix, for a folder that is missing, empty,
        half-written, of another version, or whose files are not as long as the manifest says.
        """
        folder = Path(folder).expanduser()
        manifest = read_data_manifest(folder)
        for shard in manifest.shards:
            path = folder / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "missing" if size is None else f"{size} bytes long"
                raise ValueError(
                    f"{path} is {found}, the manifest says {shard.bytes} bytes: the folder is damaged; "
                    f'remove it and run "dwt-ds prepare ... --out {folder}" again'
                )
        pad_id = int(manifest.settings["pad_id"])
        full_width = manifest.seq_len if manifest.form == PACKED else None

        def table(split: str) -> RowTable:
            shards = [shard for shard in manifest.shards if shard.name.startswith(split + "/")]
            return RowTable(folder / split, shards, pad_id, full_width)

        return cls(folder, manifest, table(TRAIN), table(VALIDATION))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the rows; ValueError if it cannot be loaded."""
        try:
            return load_tokenizer(self.folder / TOKENIZER_FOLDER)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error

    @cached_property
    def facts(self) -> TokenizerFacts:
        return TokenizerFacts.of(self.tokenizer())

    def check_tokenizer(self) -> None:
        """Raises ValueError if the tokenizer is no longer the one that made the rows."""
        digest = tokenizer_sha256(self.tokenizer())
        if digest != self.manifest.tokenizer_sha256:
            where = self.folder / TOKENIZER_FOLDER
            raise ValueError(f"{where}: sha256 is {digest}, the manifest says {self.manifest.tokenizer_sha256}")


def data_problems(folder: Path) -> list[str]:
    """One line for each thing in a data folder that has changed since it was written; empty if nothing has.

    Checks the Arrow files against their checksums, the row lengths against the Arrow files, and the tokenizer against
    its fingerprint.
    """
    try:
        manifest = read_data_manifest(folder)
        shards = {shard.name: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in manifest.shards}
        found = changed_files(folder, shards)
        if found:
            return found
        data = PreparedData.open(folder)
    except (OSError, ValueError) as error:
        return [str(error)]
    for check in (data.train.check_lengths, data.validation.check_lengths, data.check_tokenizer):
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    return found
