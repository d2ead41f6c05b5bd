"""Runs read from their folders: series, seeds, settings."""

from __future__ import annotations

import json
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


def test_a_slow_first_step_of_a_resume_counts_once(tmp_path: Path) -> None:
    """Stopped at step 199; step 200 took 61 s with the set-up, and its row's rate is that of this step alone."""
    rows = [
        {"step": 100, "tokens": 1000, "elapsed_seconds": 100.0, "tokens_per_second": 10.0, "mfu": 0.3},
        {"step": 200, "tokens": 2000, "elapsed_seconds": 260.0, "tokens_per_second": 10 / 61, "mfu": 0.3 / 61},
    ]
    run = RunRecord("run", tmp_path)
    write_run(run.path, {}, {"teacher": {"path": None}})
    (run.path / "metrics.jsonl").write_text("".join(json.dumps({**row, "hard_loss": 5.0}) + "\n" for row in rows))
    assert run.tokens_per_second == pytest.approx(2000 / 260)
    assert run.mean_over_time("mfu") == pytest.approx((100 * 0.3 + 160 * 0.3 / 61) / 260)


def test_seeds_of_a_series_come_together() -> None:
    names = ("with_teacher4-4to1-s42", "with_teacher4-4to1-s43", "alone-s42", "mine")
    groups = by_series([RunRecord(name, Path(name)) for name in names])
    assert {name: len(group) for name, group in groups.items()} == {"with teacher4, 4to1": 2, "alone": 1, "mine": 1}
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_deviation([1.0]) == (1.0, None)
