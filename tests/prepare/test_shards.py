"""Rows as they are made and stored: ids of any vocabulary, and which sentences are taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dwt_ds.data.rows import RowTable
from dwt_ds.prepare.packing import Rows, RowSettings, rows_of_sentences
from dwt_ds.prepare.rows import _one_of_every
from dwt_ds.prepare.shards import ShardWriter
from dwt_ds.prepare.tokens import Tokens


@pytest.mark.parametrize(("vocab_size", "kind"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_the_highest_id_is_stored_in_as_few_bytes_as_hold_it(vocab_size: int, kind: str, tmp_path: Path) -> None:
    settings = RowSettings("", 1, 2, vocab_size, 8, False, True, every=1, min_chars=0, max_chars=9, seed=0)
    tokens = Tokens(np.array([5, vocab_size - 1]), np.array([True, True]), np.array([2]))
    rows = rows_of_sentences(tokens, np.array([0]), np.array([0]), settings)
    assert rows.tokens.dtype == kind
    shards = ShardWriter(tmp_path / "train", vocab_size).write([rows], 1)
    stored, _ = RowTable(tmp_path / "train", shards, 0, None).rows(np.array([0]))
    assert stored.tolist() == [[1, 5, vocab_size - 1, 2]]


def test_the_hash_of_the_rows_is_of_their_tokens_and_lengths(tmp_path: Path) -> None:
    found = set()
    for tokens, lengths in (([1, 5, 2, 2], [4]), ([1, 6, 2, 2], [4]), ([1, 5, 2, 2], [2, 2])):
        writer = ShardWriter(tmp_path / "train", 9)
        rows = Rows(np.array(tokens, np.uint16), np.ones(4, bool), np.array(lengths, np.int32))
        writer.write([rows], len(lengths))
        found.add(writer.content_sha256())
    assert len(found) == 3


def test_a_last_group_that_is_short_is_taken_from_as_often() -> None:
    times = np.bincount([index for key in range(2000) for index in _one_of_every(5, 4, key)], minlength=5)
    assert np.abs(times / 2000 - 1 / 4).max() < 0.05
