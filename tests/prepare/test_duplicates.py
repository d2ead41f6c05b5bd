"""Duplicate lines, against the obvious way of finding them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from dwt_ds.prepare import duplicates
from dwt_ds.prepare.duplicates import DuplicateFinder, without_duplicates


@pytest.mark.parametrize("in_memory", [1, 100, 1 << 18])
def test_exactly_the_repeats_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    monkeypatch.setattr(duplicates, "_LINES_IN_MEMORY", in_memory)
    draw = random.Random(0)
    documents = [[f"line {draw.randint(0, 500)}" for _ in range(draw.randint(1, 9))] for _ in range(150)]
    finder = DuplicateFinder(tmp_path / "hashes")
    for document in documents:
        finder.add(document)
    bits = finder.finish()
    assert not (tmp_path / "hashes").exists()

    seen: set[str] = set()
    first = 0
    for document in documents:
        expected = []
        for line in document:
            if line not in seen:
                seen.add(line)
                expected.append(line)
        assert without_duplicates(document, first, bits) == expected
        first += len(document)
    assert int(np.unpackbits(bits).sum()) == first - len(seen)


def test_what_an_interrupted_attempt_left_is_not_counted(tmp_path: Path) -> None:
    first = DuplicateFinder(tmp_path)
    first.add(["a", "b"])
    first._flush()
    second = DuplicateFinder(tmp_path)
    second.add(["a", "b", "c"])
    assert int(np.unpackbits(second.finish()).sum()) == 0


def test_no_lines(tmp_path: Path) -> None:
    assert len(DuplicateFinder(tmp_path / "hashes").finish()) == 0
