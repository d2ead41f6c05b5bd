"""Series compared seed by seed, step times, and the training of teachers, from folders written without a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.errors import Refusal
from harness.runs import rows_of, write_run

from dwt_ds.cli.main import main
from dwt_ds.config.schema import RunConfig
from dwt_ds.study.costs import Spent, teacher_training
from dwt_ds.study.final_tables import final_tables
from dwt_ds.study.folder import StudyFolder
from dwt_ds.study.grid import Grid, StudyRun
from dwt_ds.study.overview import overview
from dwt_ds.study.pairs import (
    CANNOT_BE_TOLD,
    difference,
    find_series,
    lone_series,
    pairs_by_seed,
    series_by_settings,
)
from dwt_ds.study.records import RunRecord, differing_settings, named_runs
from dwt_ds.study.step_time import at_equal_steps, step_after_release, step_time_saving, step_time_table
from dwt_ds.study.tables import Compared


def run_of(
    folder: Path,
    name: str,
    losses: dict[int, float],
    *,
    teacher: str | None = None,
    taught: int | None = None,
    step_seconds: tuple[float, float] = (3.0, 2.0),
    data: str | None = None,
) -> RunRecord:
    """A finished run of a study, with a logged row at steps 1, 2, 4, 6, ...; its seed is in its name.

    Args:
        losses: held-out, by step.
        teacher: `teacher.path`.
        taught: steps with the teacher; None: all.
        step_seconds: seconds a step with the teacher and without; step 1 takes 100 more, and so do all evaluations.
        data: fingerprint of its rows.
    """
    config = RunConfig().to_dict()
    config["seed"], config["teacher"]["path"], config["data"]["dir"] = int(name.rpartition("-s")[2]), teacher, "nowhere"
    write_run(folder / name, {1: 9.0}, config)
    rows, seconds, last = [], 0.0, 0
    for step in sorted({1, *losses, *range(2, max(losses) + 1, 2)}):
        active = teacher is not None and (taught is None or step <= taught)
        spent = (step - last) * step_seconds[0 if active else 1] + 100 * (step == 1)
        seconds += spent
        row = {"step": step, "loss": 5.0, "hard_loss": 5.0, "soft_loss": 0.1, "soft_weight": 1.0, "tokens": 10 * step}
        row |= {"elapsed_seconds": seconds, "tokens_per_second": 10 * (step - last) / spent}
        rows.append({**row, "teacher_active": active} if teacher else row)
        if step in losses:
            rows.append({"step": step, "eval_hard_loss": losses[step], "eval_soft_loss": 0.1})
            seconds += 100
        last = step
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if data is not None:
        (folder / name / "run.json").write_text(json.dumps({"data": data}))
    labels = {"teacher": "none" if teacher is None else "teacher4"}
    return RunRecord(name, folder / name, labels, None if teacher is None else "teacher4-s1")


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([-0.2, -0.21, -0.19], "better"),
        ([0.2, 0.21, 0.19], "worse"),
        ([-0.2, 0.1, -0.1], CANNOT_BE_TOLD),
        # Mean 0.3 and a standard error of 0.1 and of 0.2.
        ([0.2, 0.4], "worse"),
        ([0.1, 0.5], CANNOT_BE_TOLD),
        ([-5.0], CANNOT_BE_TOLD),
    ],
)
def test_better_means_by_more_than_two_standard_errors(values: list[float], verdict: str, tmp_path: Path) -> None:
    runs = [RunRecord(str(value), tmp_path) for value in values]
    found = difference([(run, RunRecord("0", tmp_path)) for run in runs], lambda run: float(run.name))
    assert found is not None
    assert found.verdict() == verdict
    opposite = {"better": "worse", "worse": "better"}.get(verdict, verdict)
    assert found.verdict(less_is_better=False) == opposite
    assert found.mean == pytest.approx(sum(values) / len(values))
    if len(values) == 2:
        assert found.error == pytest.approx(abs(values[1] - values[0]) / 2)


def test_differences_are_taken_between_runs_of_one_seed_on_the_same_data(tmp_path: Path) -> None:
    alone = [run_of(tmp_path, f"alone-s{seed}", {4: 5.0 + seed}, data="a") for seed in (1, 2, 3)]
    helped = [run_of(tmp_path, f"with_teacher4-s{seed}", {4: 4.9 + seed}, teacher="t", data="a") for seed in (2, 1, 9)]
    other = [run_of(tmp_path, "with_teacher4-w4-s1", {4: 4.0}, teacher="t", data="b")]
    assert [(a.name, b.name) for a, b in pairs_by_seed(helped, alone)] == [
        ("with_teacher4-s2", "alone-s2"),
        ("with_teacher4-s1", "alone-s1"),
    ]
    assert pairs_by_seed(other, alone) == []
    (table,) = final_tables(Compared([*alone, *helped, *other], "alone"))
    rows = {row[0]: row[1:] for row in table.rows}
    # Over the seeds of all three the mean is 8.9; the two pairs differ by 0.1 each.
    assert rows["with teacher4"] == ("8.9000 ± 4.3589", "-0.1000 ± 0.0000", "0.0000", "better", "2", "3")
    assert rows["alone"] == ("7.0000 ± 1.0000", "", "", "", "", "3")
    assert rows["with teacher4, w4"] == ("4.0000", "", "", "", "", "1")
    (table,) = final_tables(Compared([*alone, *helped], "with teacher4"))
    assert {row[0]: row[2] for row in table.rows} == {"alone": "+0.1000 ± 0.0000", "with teacher4": ""}


def test_the_lone_student_is_the_best_of_several_with_all_seeds(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, f"alone-s{seed}", {4: 5.0}) for seed in (1, 2)]
    runs += [run_of(tmp_path, f"alone-lr2e_3-s{seed}", {4: 4.8}) for seed in (1, 2)]
    runs += [run_of(tmp_path, "alone-lr4e_3-s1", {4: 4.0})]
    runs += [run_of(tmp_path, "with_teacher4-s1", {4: 3.0}, teacher="t")]
    assert lone_series(runs) == "alone, lr2e 3"
    assert lone_series(runs[-1:]) is None


def test_a_runs_pace_with_its_teacher_and_without(tmp_path: Path) -> None:
    alone = run_of(tmp_path, "alone-s1", {10: 6.0, 20: 5.0})
    helped = run_of(tmp_path, "with_teacher4-s1", {10: 5.5, 20: 4.5}, teacher="t", taught=6, step_seconds=(3.0, 2.2))
    # Whatever else the machine did in one interval.
    rows = rows_of(helped.path)
    for row in rows:
        if row["step"] in (4, 14) and "tokens_per_second" in row:
            row["tokens_per_second"] /= 50
    (helped.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert helped.steps_with_teacher == 6
    assert [helped.with_teacher("step", until) for until in (3, 6, 20)] == [3, 6, 6]
    assert helped.seconds_a_step(with_teacher=True) == pytest.approx(3.0)
    assert helped.seconds_a_step(with_teacher=False) == pytest.approx(2.2)
    assert alone.seconds_a_step(with_teacher=True) is None
    assert alone.seconds_a_step(with_teacher=False) == pytest.approx(2.0)
    assert step_after_release(helped, alone) == pytest.approx(1.1)
    assert at_equal_steps(helped, alone) == pytest.approx((6 * 3.0 + 14 * 2.2) / 40)
    # As good at step 15.
    assert step_time_saving(helped, alone) == pytest.approx(1 - (6 * 3.0 + 9 * 2.2) / 40)
    assert step_time_saving(alone, helped) is None
    row = step_time_table(Compared([alone, helped], "alone")).rows[1]
    assert row == ("with teacher4", "3", "2.2", "30%", "1.10", "1.22", "6%", "1")
    kept = run_of(tmp_path, "with_teacher4-never-s1", {10: 5.5, 20: 4.5}, teacher="t")
    assert step_after_release(kept, alone) is None
    assert at_equal_steps(kept, alone) == pytest.approx(1.5)


def test_what_made_the_teacher_is_known_where_it_is_a_run(tmp_path: Path) -> None:
    teacher = run_of(tmp_path, "teacher-s1", {10: 6.0, 20: 5.0})
    # 20 steps of 2 s, and 100 s for the first; an evaluation before the end takes 100.
    whole = Spent(200.0, None, 240.0)
    helped = [
        run_of(tmp_path, f"{name}-s1", {10: 5.5, 20: 4.5}, teacher=str(path))
        for name, path in (
            ("helped", teacher.path / "export"),
            ("early", teacher.path / "export" / "step_00000010"),
            ("far", tmp_path / "elsewhere" / "export"),
        )
    ]
    plain = [RunRecord(run.name, run.path, series_name=run.name) for run in helped]
    assert teacher_training(plain[0]) == whole
    assert teacher_training(plain[1]) == Spent(100.0, None, 120.0)
    assert teacher_training(plain[2]) is None
    assert teacher_training(teacher) is None
    # A teacher that had a teacher of its own.
    second = RunRecord(
        "second-s1", run_of(tmp_path, "second-s1", {20: 4.0}, teacher=str(plain[0].path / "export")).path
    )
    taught = teacher_training(second)
    assert taught is not None
    assert (taught.tokens, taught.seconds) == (400.0, 240.0 + 260.0)
    _, rows = overview([teacher, *plain], teacher)
    table = {name: cells for name, *cells in rows}
    # As good as its teacher at step 15: 100 and 245 seconds, and the evaluation at step 10.
    assert table["as good as teacher-s1 after: time"] == [
        "4m00s",
        "4m05s (2% more)",
        "4m05s (2% more)",
        "4m05s (2% more)",
    ]
    counted = "as good as teacher-s1, the teacher's training counted:"
    assert table[f"{counted} tokens"] == ["", "350 (75% more)", "250 (25% more)", "not known"]
    assert table[f"{counted} time"] == ["", "8m05s (102% more)", "6m05s (52% more)", "not known"]
    assert table[f"{counted} FLOPs"] == ["", "not known", "not known", "not known"]
    assert table["all steps, teacher-s1 = 1"] == ["", "1.50", "1.50", "1.50"]
    assert table["seconds a step"] == ["2", *["3 with the teacher"] * 3]
    assert table["steps with the teacher"] == ["", *["20 (100%)"] * 3]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two grids in one folder: two kinds of lone students, and one distilled series; another has only a lone one."""
    folder = StudyFolder(tmp_path / "study")
    ends = {"alone": 5.0, "alone-fast": 4.8, "with_teacher4": 4.7}
    runs = []
    for stem, end in ends.items():
        for seed in (1, 2):
            taught = stem.startswith("with")
            path = str(folder.path / "teacher4-s1" / "export") if taught else None
            run = run_of(folder.path, f"{stem}-s{seed}", {10: 6.0, 20: end + 0.1 * seed}, teacher=path)
            runs.append(StudyRun(run.name, {}, seed, run.labels, run.teacher_run))
    for name, chosen in (("many", runs), ("one", runs[:2])):
        grid = Grid(name, f"Grid {name}", "Why?", "smoke", None, False, 2, None, chosen)
        folder.write_grid(grid, {run.name: "finished" for run in chosen})
    return folder.path


@pytest.mark.usefixtures("undrawn")
def test_a_study_is_compared_with_its_best_lone_student_or_with_the_series_that_is_named(study: Path) -> None:
    assert main(["report", str(study)]) == 0
    html = (study / "report" / "index.html").read_text(encoding="utf-8")
    assert "compared with &quot;alone, fast&quot;, of the lone students with the most seeds" in html
    assert "The others are compared with &quot;alone&quot;." in html
    assert html.count("Why?") == 2
    text = (study / "report" / "results.md").read_text(encoding="utf-8")
    assert "| with teacher4 | 4.8500 ± 0.0707 | -0.1000 ± 0.0000 | 0.0000 | better | 2 | 2 |" in text
    assert "| alone | 5.1500 ± 0.0707 | +0.2000 ± 0.0000 | 0.0000 | worse | 2 | 2 |" in text
    assert main(["report", str(study), "--against", "with_teacher4-s2"]) == 0
    text = (study / "report" / "results.md").read_text(encoding="utf-8")
    assert "| alone, fast | 4.9500 ± 0.0707 | +0.1000 ± 0.0000 | 0.0000 | worse | 2 | 2 |" in text
    assert "### Until as good as with teacher4 at its end" in text
    html = (study / "report" / "index.html").read_text(encoding="utf-8")
    assert html.count("The others are compared with &quot;with teacher4&quot;.") == 2
    assert text.count("| alone | 5.1500 ± 0.0707 | +0.3000 ± 0.0000 |") == 2, "the other grid borrows the series"


def test_a_series_is_known_by_its_name_and_those_of_its_runs() -> None:
    runs = [RunRecord("alone-s1", Path("a")), RunRecord("with_teacher4-4to1-s1", Path("b"))]
    for name in ("with teacher4, 4to1", "with_teacher4-4to1", "with_teacher4-4to1-s1"):
        assert find_series(name, runs) == runs[1:]
    assert find_series("with_teacher4", runs) == []
    slow = RunRecord("alone-lr5e-4-s1", Path("c"), {"teacher": "none", "rate": "lr5e-4"})
    assert slow.series == "alone, lr5e-4"


@pytest.mark.usefixtures("undrawn")
def test_runs_that_differ_in_their_seed_alone_are_one_series(tmp_path: Path) -> None:
    paths = []
    for stem, teacher, end in (("alone", None, 5.0), ("bias", "t/export", 4.8), ("once", "u/export", 4.9)):
        for seed in (1, 2)[: 1 if stem == "once" else 2]:
            run = run_of(tmp_path, f"{stem}-s{seed}", {10: 6.0, 20: end + seed}, teacher=teacher)
            paths.append(str(run.path))
    assert [run.series for run in series_by_settings(named_runs([Path(path) for path in paths]))] == [
        *["alone"] * 2,
        *["bias"] * 2,
        "once-s1",
    ]
    assert main(["report", *paths, "--against", "alone-s2"]) == 0
    text = (tmp_path / "report" / "results.md").read_text(encoding="utf-8")
    assert "| bias | 6.3000 ± 0.7071 | -0.2000 ± 0.0000 | 0.0000 | better | 2 | 2 |" in text
    assert "| once-s1 | 5.9000 | -0.1000 |  | cannot be told | 1 | 1 |" in text
    assert "| held-out loss minus alone-s2 |" not in text, "runs are still compared one by one, too"
    assert "| held-out loss minus alone-s2's | -1.0000 |  |" in text
    assert main(["report", *paths[1:3], "--against", "alone-s2"]) == 0
    text = (tmp_path / "report" / "results.md").read_text(encoding="utf-8")
    assert "cannot be told" not in text, "single runs have no pairs"


def test_a_series_has_each_seed_once_and_one_batch(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, f"{stem}-s{seed}", {4: 5.0}) for stem in ("alone", "again", "ranks") for seed in (1, 2)]
    for run, rows in zip(runs, (16, 16, 16, 16, 16, 32)):
        (run.path / "ds_config.json").write_text(json.dumps({"train_batch_size": rows}))
    found = series_by_settings(named_runs([run.path for run in runs]))
    assert [(run.name, run.series) for run in found] == [
        ("alone-s1", "alone"),
        ("alone-s2", "alone"),
        ("again-s1", "again"),
        ("again-s2", "again"),
        ("ranks-s1", "ranks-s1"),
        ("ranks-s2", "ranks-s2"),
    ]
    assert ("train_batch_size", "16", "32") in differing_settings([found[0], found[-1]])


@pytest.mark.usefixtures("undrawn")
def test_runs_that_are_not_complete_are_no_pairs(tmp_path: Path) -> None:
    runs = {stem: [run_of(tmp_path, f"{stem}-s{seed}", {4: 5.0 + seed}) for seed in (1, 2)] for stem in ("a", "b")}
    for run in runs["b"]:
        config = run.config | {"data": run.config["data"] | {"workers": 0}}
        (run.path / "config.yaml").write_text(json.dumps(config))
    paths = [str(run.path) for group in runs.values() for run in group]
    command, results = ["report", *paths, "--against", "a-s1"], tmp_path / "report" / "results.md"
    assert main(command) == 0
    assert "standard error" in results.read_text()
    for end in (runs["b"][1], runs["a"][0]):
        (end.path / "complete.json").unlink()
        assert main(command) == 0
        assert "standard error" not in results.read_text()


def test_a_study_cannot_be_compared_with_what_is_not_in_it(study: Path, refusal: Refusal) -> None:
    error = refusal("report", study, "--against", "with teacher")
    assert error.startswith(
        "error: --against with teacher: is not one of the series (alone; alone, fast; with teacher4)"
    )
    assert "did you mean 'with teacher4'" in error
    for seed in (1, 2):
        (study / f"with_teacher4-s{seed}" / "complete.json").unlink()
    assert "none of its runs is complete yet" in refusal("report", study, "--against", "with teacher4")
