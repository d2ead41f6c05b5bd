"""Opening a data folder: whole ones, and everything that is none."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from harness.errors import error_of

from dwt_ds.data.prepared import PreparedData, data_problems
from dwt_ds.data.show import warnings_of
from dwt_ds.data.tokenizer import tokenizer_sha256


@pytest.fixture
def copied(packed: PreparedData, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.folder, tmp_path / "data"))


def test_rows_are_padded_and_memory_mapped(packed: PreparedData) -> None:
    ids, lengths = packed.train.rows(np.array([5, 2, 5]))
    assert ids.shape == (3, int(lengths.max()))
    assert (ids[0] == ids[2]).all()
    wide, _ = packed.train.rows(np.array([5, 2]), width=40)
    assert (wide[:, int(lengths.max()) :] == packed.facts.pad_id).all()
    assert isinstance(packed.train.lengths, np.memmap)
    assert packed.train.lengths.dtype == np.int32
    assert len(packed.train.lengths) == len(packed.train) == packed.manifest.rows
    assert packed.train.full_width == 32


def test_pickled_tables_read_the_same(packed: PreparedData) -> None:
    pickled = pickle.dumps(packed.train)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert (again.rows(np.arange(4))[0] == packed.train.rows(np.arange(4))[0]).all()


def test_a_file_that_is_cut_off_during_a_run_is_no_text(copied: Path) -> None:
    """What is left of its last page reads as zeros, offsets of the rows among them."""
    for name in ("data-00000-of-00001.arrow", "lengths.npy"):
        file, rows = copied / "train" / name, np.arange(4)
        table, content = PreparedData.open(copied).train, file.read_bytes()
        table.rows(rows)
        os.truncate(file, 128)
        with pytest.raises(OSError, match=r"train: a row has \d+ tokens, lengths.npy says \d+: the files were changed"):
            table.rows(rows)
        file.write_bytes(content)


def test_tokenizer_is_stored_with_the_rows(packed: PreparedData) -> None:
    assert tokenizer_sha256(packed.tokenizer()) == packed.manifest.tokenizer_sha256
    assert packed.facts.vocab_size == packed.manifest.vocab_size


def test_validation_may_be_empty(tmp_path: Path, make, corpus_file: Path) -> None:  # type: ignore[no-untyped-def]
    data = make(tmp_path / "data", corpus_file, validation=0.0)
    assert len(data.validation) == 0
    assert len(data.validation.lengths) == 0
    assert warnings_of(data.manifest) == []
    assert data.validation.knows_words, "whole words are no reason to refuse it"
    assert data.validation.rows(np.zeros(0, dtype=np.int64))[0].shape == (0, 0)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='does not exist: run "dwt-ds prepare'):
        PreparedData.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match='is empty: run "dwt-ds prepare'):
        PreparedData.open(tmp_path)
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json"):
        PreparedData.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "manifest.json: .*; run"),
        ("{}", "not a manifest"),
        ("3", "not a manifest"),
        ('{"format_version": 99}', "data format 99, this version reads format 1; run .* into a new folder"),
        ('{"format_version": 1, "rows": 2}', "documents: missing; run"),
    ],
)
def test_manifests_that_cannot_be_read(copied: Path, content: str, message: str) -> None:
    (copied / "manifest.json").write_text(content)
    assert re.search(message, error_of(PreparedData.open, copied))


def test_truncated_and_missing_shards(copied: Path) -> None:
    shard = next((copied / "train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match="bytes long, the manifest says .* damaged; remove it and run"):
        PreparedData.open(copied)
    shard.unlink()
    with pytest.raises(ValueError, match="is missing, the manifest says"):
        PreparedData.open(copied)


@pytest.mark.parametrize("content", [b"", b"x", b"\x93NUMPY"])
def test_lengths_that_are_damaged(content: bytes, copied: Path) -> None:
    (copied / "train" / "lengths.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"lengths\.npy is damaged \(.*\); prepare the data again$"):
        PreparedData.open(copied)


def test_a_tokenizer_that_is_damaged(copied: Path) -> None:
    (copied / "tokenizer" / "tokenizer.json").write_text('{"model": {"type": "of a later version"}}')
    with pytest.raises(ValueError, match=r"^tokenizer path .*tokenizer' cannot be read: "):
        PreparedData.open(copied).tokenizer()


def test_lengths_of_another_folder(copied: Path) -> None:
    lengths = np.load(copied / "train" / "lengths.npy")
    for others in (lengths[:-1], np.append(lengths, 9)):
        np.save(copied / "train" / "lengths.npy", others)
        with pytest.raises(ValueError, match="lengths.npy has .* rows, the Arrow files"):
            PreparedData.open(copied)


def test_all_that_has_changed_in_a_folder_is_told(copied: Path) -> None:
    assert data_problems(copied) == []
    for split in ("train", "validation"):
        np.save(copied / split / "lengths.npy", np.load(copied / split / "lengths.npy") - 1)
    tokenizer = copied / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"ren"', '"zen"'))
    found = data_problems(copied)
    assert [problem.split(":")[0].split(" ")[0] for problem in found] == [
        *(f"{copied}/{split}/lengths.npy" for split in ("train", "validation")),
        f"{copied}/tokenizer",
    ]
