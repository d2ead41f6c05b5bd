"""Runs read from their folders: series, seeds, settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.runs import write_run

from dwt_ds.study.records import RunRecord, by_series, differing_settings, mean_and_deviation


def test_settings_that_differ(tmp_path: Path) -> None:
    for name, weight in (("a", 1.0), ("b", 4.0)):
        write_run(
            tmp_path / name, {1: 5.0}, {"seed": 1, "output_dir": name, "distill": {"soft_weight": {"start": weight}}}
        )
    rows = differing_settings([RunRecord("a", tmp_path / "a"), RunRecord("b", tmp_path / "b")])
    assert rows == [("distill.soft_weight.start", "1.0", "4.0")]


def test_seeds_of_a_series_come_together() -> None:
    names = ("with_teacher4-4to1-s42", "with_teacher4-4to1-s43", "alone-s42", "mine")
    groups = by_series([RunRecord(name, Path(name)) for name in names])
    assert {name: len(group) for name, group in groups.items()} == {"with teacher4, 4to1": 2, "alone": 1, "mine": 1}
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_deviation([1.0]) == (1.0, None)
