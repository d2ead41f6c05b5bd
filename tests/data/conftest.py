"""Pairs of a student's data and a teacher's tokenizer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from harness.corpus import Make
from harness.teacher_rows import PAIRS, Pair


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, make: Make) -> Any:
    @lru_cache
    def pair(name: str) -> Pair:
        return Pair(name, tmp_path_factory.mktemp("pair"), make)

    return pair


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, pairs: Any) -> Pair:
    return pairs(request.param)


@pytest.fixture
def one(pairs: Any) -> Pair:
    return pairs("WordPiece uncased to byte-level BPE")
