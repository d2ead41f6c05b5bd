"""What a study runs, skips, resumes and estimates."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.gpus import have_gpus

from dwt_ds.cli.main import main
from dwt_ds.launch.commands import run_logged
from dwt_ds.launch.supervise import STOPPED
from dwt_ds.study import run as study_run
from dwt_ds.study.folder import StudyFolder
from dwt_ds.study.grid import load_grid
from dwt_ds.study.progress import StudyProgress


def starts(study: Path, name: str) -> int:
    path = study / name / "starts"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_a_failed_run_does_not_stop_the_others_and_the_next_start_repeats_it(
    exit_codes: dict[int, int], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "my study"
    arguments = ["study", "teacher_quality", "--out", str(study), f"data.dir={tiny_data}"]
    exit_codes[2] = 1
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "5 of 7 runs are finished" in said
    assert "teacher2-s42: failed with exit code 1" in said
    assert "with_teacher2-s42: skipped: its teacher teacher2-s42 is not finished" in said
    assert "no luck" in (study / "logs" / "teacher2-s42.log").read_text()
    status = {run["name"]: run["status"] for run in json.loads((study / "teacher_quality.json").read_text())["runs"]}
    assert status["with_teacher1-s42"] == "finished"

    exit_codes.clear()
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "7 of 7 runs are finished" in said
    assert f"to see the results: dwt-ds report '{study}'" in said
    assert [starts(study, name) for name in ("teacher4-s42", "teacher2-s42", "with_teacher2-s42")] == [1, 2, 1]

    # Another grid in the same folder uses the runs that it shares with this one.
    assert main(["study", "remapping", "--out", str(study), f"data.dir={tiny_data}"]) == 0
    assert [starts(study, name) for name in ("alone-s42", "with_teacher4-s42", "with_teacher4-remap-s42")] == [1, 1, 1]


def test_a_study_goes_on_where_its_output_is_lost(
    exit_codes: dict[int, int], remapping: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        for name in ("stdout", "__stdout__"):
            monkeypatch.setattr(sys, name, full)
        assert main(remapping) == 0
    assert starts(Path(remapping[remapping.index("--out") + 1]), "teacher4-s42") == 1


def test_seeds_that_are_added_later_join_the_earlier_ones(
    exit_codes: dict[int, int], remapping: list[str], tmp_path: Path
) -> None:
    """Also where only the teacher was trained before."""
    study = tmp_path / "study"
    exit_codes[6] = 1
    assert main([*remapping, "--seeds", "42"]) == 1
    exit_codes.clear()
    for seeds in ("43,44", "42"):
        assert main([*remapping, "--seeds", seeds]) == 0
    assert [path.name for path in sorted(study.glob("teacher4-*"))] == ["teacher4-s42"]
    assert starts(study, "teacher4-s42") == 1
    [grid] = StudyFolder(study).grids()
    assert {run["teacher_run"] for run in grid["runs"]} == {None, "teacher4-s42"}
    assert {run["status"] for run in grid["runs"]} == {"finished"}
    series = ("alone", "with_teacher4", "with_teacher4-remap")
    names = {run["name"] for run in grid["runs"]}
    assert names == {"teacher4-s42", *(f"{each}-s{seed}" for each in series for seed in (42, 43, 44))}


def test_an_interrupted_run_ends_the_study_and_the_next_start_resumes_it(
    exit_codes: dict[int, int], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's supervisor reports that it saved and can resume."""
    study = tmp_path / "study"
    arguments = ["study", "teacher_quality", "--out", str(study), f"data.dir={tiny_data}"]
    exit_codes[2] = STOPPED
    assert main(arguments) == 130
    assert "interrupted: the same command resumes the study" in capsys.readouterr().err
    order = [run.name for run in load_grid("teacher_quality", "smoke").runs]
    at = order.index("teacher2-s42")
    assert 0 < at < len(order) - 1
    assert [starts(study, name) for name in order] == [1] * (at + 1) + [0] * (len(order) - at - 1)
    status = [run["status"] for run in json.loads((study / "teacher_quality.json").read_text())["runs"]]
    assert status == ["finished"] * at + ["waiting"] * (len(order) - at)

    exit_codes.clear()
    assert main(arguments) == 0
    assert [starts(study, name) for name in order] == [2 if name == "teacher2-s42" else 1 for name in order]


ALONE = {"runs": [{"teacher": "none"}]}
GRID_OF_FOUR = {"runs": [{"teacher": "teacher4"}, {"teacher": "none", "rate": ["lr1e-3", "lr2e-3"]}], "seeds": [42]}


@pytest.fixture
def grid_of_four(tmp_path: Path) -> str:
    """teacher4, with_teacher4, and two that train alone."""
    path = tmp_path / "four.yaml"
    path.write_text(yaml.safe_dump(GRID_OF_FOUR), encoding="utf-8")
    return str(path)


def test_two_runs_at_once_and_a_student_after_its_teacher(
    exit_codes: dict[int, int], grid_of_four: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, running, most, changes = list[str](), 0, 0, threading.Lock()
    together = threading.Barrier(2, timeout=60)

    def overlapping(command: list[str], log: Path, stop: threading.Event) -> int:
        nonlocal running, most
        with changes:
            begun.append(log.stem)
            running += 1
            most = max(most, running)
        together.wait()
        code = run_logged(command, log, stop)
        with changes:
            running -= 1
        return code

    monkeypatch.setattr(study_run, "run_logged", overlapping)
    study = tmp_path / "study"
    assert main(["study", grid_of_four, "--out", str(study), "--at-once", "2", f"data.dir={tiny_data}"]) == 0
    assert set(begun[:2]) == {"teacher4-s42", "alone-s42"}, "the student waits for its teacher, the lone one does not"
    assert set(begun[2:]) == {"with_teacher4-s42", "alone-lr2e-3-s42"}
    assert most == 2


def test_a_signal_ends_all_runs_at_once(
    exit_codes: dict[int, int],
    grid_of_four: str,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes, together = dict[str, int](), threading.Barrier(2, timeout=60)

    def endless(command: list[str], log: Path, stop: threading.Event) -> int:
        if together.wait() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        codes[log.stem] = run_logged(["sleep", "30"], log, stop)
        return codes[log.stem]

    monkeypatch.setattr(study_run, "run_logged", endless)
    study = tmp_path / "study"
    assert main(["study", grid_of_four, "--out", str(study), "--at-once", "2", f"data.dir={tiny_data}"]) == 130
    assert "interrupted: the same command resumes the study" in capsys.readouterr().err
    assert codes == dict.fromkeys(["teacher4-s42", "alone-s42"], -signal.SIGTERM)
    assert {run["status"] for run in json.loads((study / "four.json").read_text())["runs"]} == {"waiting"}


def test_a_line_tells_how_far_several_runs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    folder = StudyFolder(tmp_path)
    done, half = folder.run("done"), folder.run("half")
    for run in (done, half):
        run.path.mkdir()
    half.add_metrics({"step": 20})
    progress = StudyProgress(folder, {"done": 100, "half": 100, "waiting": 100})
    assert progress.seconds_to_next() == 10
    clock += 10
    assert progress.seconds_to_next() == 0
    done.finish(100)
    half.add_metrics({"step": 40})
    expected = "10s  1 of 3 runs finished, 1 running  step 140 of 300, 12.0 steps/s, ETA 13s"
    assert progress.line(running=1) == expected
    clock += 1000
    progress.line(running=1)
    assert progress.seconds_to_next() == pytest.approx(20.2), "in long studies the lines are further apart"


def test_a_students_recipe_names_its_teachers_export(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    runs = {run.name: run for run in load_grid("remapping", "smoke").runs}

    def recipe_of(name: str) -> Any:
        return yaml.safe_load(folder.write_recipe(runs[name], folder.recipe(name)).read_text())

    recipe = recipe_of("with_teacher4-remap-s42")
    assert recipe["teacher"]["path"] == str(tmp_path / "teacher4-s42" / "export")
    assert recipe["output_dir"] == str(tmp_path / "with_teacher4-remap-s42")
    assert (recipe["seed"], recipe["student"]["init"]) == (42, "remap")
    assert recipe_of("alone-s42")["teacher"]["path"] is None


def test_a_dry_run_lists_steps_tokens_and_hours_and_writes_nothing(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    arguments = ["study", "soft_weight", "--out", str(study), f"data.dir={tiny_data}", "train.max_steps=1000"]
    assert main([*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "How much weight should the soft loss have?"
    row = next(line for line in lines if line.startswith("with_teacher4-4to1-s42")).split()
    # 1,000 steps of 2 x 4 rows of 32 tokens, all but a few of them real.
    assert row[1] == "1,000"
    assert 250 < float(row[2]) <= 256
    assert row[3] == "k"
    assert float(row[4]) > float(next(line for line in lines if line.startswith("alone-s42")).split()[4])
    assert lines[-1].split()[:4] == ["6", "to", "run", "6,000"]
    assert not study.exists()


def test_missing_data_stop_the_study_before_the_first_run(
    tmp_path: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refusal: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("alone.yaml").write_text(yaml.safe_dump(ALONE))
    assert main(["study", "alone.yaml", "--dry-run"]) == 0
    assert "data: assumed, since data/quickstart does not exist: the paper's 30M sentences" in capsys.readouterr().out
    for data in ("data/quickstart", "nowhere"):
        error = refusal("study", "teacher_quality", f"data.dir={data}")
        assert f'data folder {data} does not exist: run "dwt-ds prepare' in error
    (tmp_path / "apart").mkdir()
    manifest = json.loads((tiny_data / "manifest.json").read_text()) | {"validation_rows": 0}
    (tmp_path / "apart" / "manifest.json").write_text(json.dumps(manifest))
    error = refusal("study", "remapping", "data.dir=apart", "student.max_positions=128")
    assert "apart has no held-out rows" in error
    assert "prepare it with --validation above 0" in error
    assert not (tmp_path / "runs").exists()


def test_finished_runs_need_no_data(exit_codes: dict[int, int], tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_bytes((tiny_data / "manifest.json").read_bytes())
    arguments = ["study", "remapping", "--out", str(tmp_path / "study"), f"data.dir={data}"]
    assert main([*arguments, "student.max_positions=128"]) == 0
    data.rename(tmp_path / "gone")
    assert main([*arguments, "student.max_positions=128"]) == 0


def test_more_ranks_than_gpus_are_refused_with_settings_of_the_same_tokens(
    exit_codes: dict[int, int],
    remapping: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
) -> None:
    have_gpus(monkeypatch, 1)
    assert main([*remapping, "--dry-run"]) == 0
    fix = ["--ranks", "1", "train.gradient_accumulation_steps=2"]
    assert refusal(*remapping) == (
        f"error: 2 ranks a run need 2 GPUs, and this machine has 1; {' '.join(fix)} has as many tokens a step\n"
    )
    have_gpus(monkeypatch, 3)
    assert "--ranks 3 train.gradient_accumulation_steps=4" in refusal(
        *remapping, "--ranks", "6", "train.gradient_accumulation_steps=2"
    )
    assert main(remapping) == 0
    have_gpus(monkeypatch, 1)
    assert main([*remapping, *fix]) == 0
    assert starts(tmp_path / "study", "alone-s42") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teacher_quality", "seed=3"], "the study sets seed itself"),
        (["teacher_quality", "teacher={sharded: true}"], "the study sets teacher.path itself"),
        (["teacher_quality", "train.max_step=3"], "train.max_step: unknown key; did you mean 'max_steps'"),
        (["teacher_quality", "--seeds", "a"], "--seeds='a'"),
        (["teacher_quality", "--at-once", "0"], "--at-once 0: must be at least 1"),
        (["nothing"], "no such file and no packaged grid"),
        (["soft_weight", "--glue", "nowhere"], "GLUE folder 'nowhere': no such folder"),
    ],
)
def test_mistakes_stop_the_study_before_the_first_run(
    arguments: list[str], message: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    assert message in refusal("study", *arguments, "--out", tmp_path / "study")
    assert not (tmp_path / "study").exists()
