"""Runs read from their folders: series, seeds, settings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from harness.runs import write_run

from dwt_ds.study.final_tables import final_tables
from dwt_ds.study.overview import overview
from dwt_ds.study.pairs import CANNOT_BE_TOLD, lone_series
from dwt_ds.study.records import RunRecord, by_series, common_tasks, differing_settings, mean_and_deviation
from dwt_ds.study.tables import Compared


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


def scored_run(folder: Path, step: int, tasks: dict[str, list[float]]) -> RunRecord:
    """A run of 12 steps whose export of `step` has scores on `tasks`, by fine-tuning seed."""
    write_run(folder, {12: 5.0}, {"seed": 1})
    by_task = {name: {"score": {"by_seed": dict(enumerate(points))}} for name, points in tasks.items()}
    results = folder / "glue" / f"step_{step:08d}" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps({"tasks": by_task}))
    return RunRecord(f"{folder.name}-s1", folder)


def test_fine_tuned_scores_are_compared_on_the_tasks_that_all_have(tmp_path: Path) -> None:
    points = {"CoLA": [20.0, 24.0, 8.0], "SST-2": [80.0, 82.0], "WNLI": [0.0, 0.0]}
    alone = scored_run(tmp_path / "alone", 12, points)
    assert common_tasks([alone]) == ["SST-2", "CoLA"], "not those outside the seven"
    assert alone.scores(common_tasks([alone])) == {12: [50.0, 53.0]}, "seeds that have all tasks"
    # CoLA's fine-tuning failed, and its mean would be far ahead of the others'.
    helped = scored_run(tmp_path / "helped", 12, {"SST-2": [79.0, 80.0]})
    (table,) = (each for each in final_tables(Compared([alone, helped], "alone")) if each.title == "Fine-tuned score")
    assert [row[1] for row in table.rows] == ["81.0", "79.5"]
    assert "(SST-2)" in table.note
    earlier = scored_run(tmp_path / "earlier", 8, {"SST-2": [90.0]})
    assert earlier.final_score(["SST-2"]) is None, "an export along the way is not the last one"
    unlike = scored_run(tmp_path / "unlike", 12, {"MRPC": [90.0]})
    assert all(each.title != "Fine-tuned score" for each in final_tables(Compared([helped, unlike], "helped")))


def test_a_run_that_diverged_at_its_end_has_no_final_loss(tmp_path: Path) -> None:
    runs = []
    for name, end in (("alone-fast", None), ("alone", 5.0)):
        write_run(tmp_path / name, {4: 4.0}, {"seed": 1, "teacher": {"path": None}})
        row = {"step": 12, "eval_hard_loss": end, "eval_soft_loss": 0.0, "eval_hard_loss.docs": end}
        metrics = tmp_path / name / "metrics.jsonl"
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]) + json.dumps(row) + "\n")
        runs.append(RunRecord(f"{name}-s1", tmp_path / name, {"teacher": "none"}))
    assert math.isnan(runs[0].final_loss)
    assert lone_series(runs) == "alone"
    for table in final_tables(Compared(runs, "alone")):
        cells = {row[0]: row[1:] for row in table.rows}
        assert cells["alone, fast"][:4] == ("nan", "+nan", "", CANNOT_BE_TOLD), table.title
    _, rows = overview(runs, None)
    assert ["held-out loss", "not finite", "5.0000"] in rows
