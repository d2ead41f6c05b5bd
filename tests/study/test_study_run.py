from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwt_ds.cli.main import main
from dwt_ds.recipe import load_recipe
from dwt_ds.study import launch, scores
from dwt_ds.study import run as study_run
from dwt_ds.study.folder import StudyFolder
from dwt_ds.study.grid import grid_names, load_grid

# Stands for a pre-training: complete at once, or failing if told so.
STAND_IN = """
import json, pathlib, sys
folder, config, fails = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write("started\\n")
if fails == "True":
    sys.exit("no luck")
(folder / "config.yaml").write_text(config)
(folder / "metrics.jsonl").write_text(json.dumps({"step": 12, "eval_hard_loss": 5.5, "eval_soft_loss": 0.1}) + "\\n")
(folder / "export").mkdir(exist_ok=True)
(folder / "complete.json").write_text('{"steps": 12}')
"""


@pytest.fixture
def fail_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Runs of so many layers fail; nothing is trained."""
    program, failing = tmp_path / "stand_in.py", list[int]()
    program.write_text(STAND_IN, encoding="utf-8")

    def command(recipe: Path, overrides: Sequence[str], ranks: int) -> list[str]:
        config = load_recipe(str(recipe), overrides).config
        fails = config.student.layers in failing
        return [sys.executable, str(program), config.output_dir, yaml.safe_dump(config.to_dict()), str(fails)]

    monkeypatch.setattr(study_run, "pretrain_command", command)
    return failing


def starts(study: Path, name: str) -> int:
    path = study / name / "starts"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_a_failure_does_not_lose_the_others_and_the_next_start_goes_on(
    fail_layers: list[int], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    arguments = ["study", "teacher_quality", "--out", str(study), f"data.dir={tiny_data}"]
    fail_layers.append(2)
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "5 of 7 runs are finished" in said
    assert "teacher2-s42: failed with exit code 1" in said
    assert "with_teacher2-s42: skipped: its teacher teacher2-s42 is not there" in said
    assert "no luck" in (study / "logs" / "teacher2-s42.log").read_text()
    status = {run["name"]: run["status"] for run in json.loads((study / "teacher_quality.json").read_text())["runs"]}
    assert status["with_teacher1-s42"] == "finished"

    fail_layers.clear()
    assert main(arguments) == 0
    assert "7 of 7 runs are finished" in capsys.readouterr().out
    assert [starts(study, name) for name in ("teacher4-s42", "teacher2-s42", "with_teacher2-s42")] == [1, 2, 1]

    # Another grid takes over the runs that it has in common with this one.
    assert main(["study", "remapping", "--out", str(study), f"data.dir={tiny_data}"]) == 0
    assert [starts(study, name) for name in ("alone-s42", "with_teacher4-s42", "with_teacher4-remap-s42")] == [1, 1, 1]


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


def test_a_dry_run_tells_steps_tokens_and_hours_and_leaves_nothing(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    arguments = ["study", "soft_weight", "--out", str(study), f"data.dir={tiny_data}", "train.max_steps=1000"]
    assert main([*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("with_teacher4-4to1-s42")).split()
    # 1,000 steps of 2 x 4 rows of 32 tokens, all but a few of them real.
    assert row[1] == "1,000"
    assert 250 < float(row[2]) <= 256
    assert row[3] == "k"
    assert float(row[4]) > float(next(line for line in lines if line.startswith("alone-s42")).split()[4])
    assert lines[-1].split()[:4] == ["6", "to", "run", "6,000"]
    assert not study.exists()


def test_a_folder_with_other_settings_is_refused(
    fail_layers: list[int], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["study", "remapping", "--out", str(tmp_path / "study"), f"data.dir={tiny_data}"]
    assert main(arguments) == 0
    assert main([*arguments, "train.learning_rate=0.5"]) == 2
    error = capsys.readouterr().err
    assert "train.learning_rate=0.001, this study says 0.5" in error
    assert error.count("\n") == 1
    assert main([*arguments, "train.log_every=3"]) == 0  # says nothing about what is learned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teacher_quality", "seed=3"], "the study sets seed itself"),
        (["teacher_quality", "train.max_step=3"], "train.max_step: unknown key; did you mean 'max_steps'"),
        (["teacher_quality", "--seeds", "a"], "--seeds='a'"),
        (["nothing"], "no such file and no packaged grid"),
        (["soft_weight", "--glue", "nowhere"], "GLUE folder 'nowhere': no such folder"),
    ],
)
def test_mistakes_are_told_before_the_first_run(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    assert main(["study", *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_glue_options_become_those_of_the_command() -> None:
    from dwt_ds.study.scores import glue_command

    command = glue_command(Path("m"), Path("o"), {"dir": "g", "tasks": ["CoLA", "MRPC"], "max_steps": 5})
    assert " ".join(command[3:]) == "glue --model m --out o --glue-dir g --tasks CoLA,MRPC --max-steps 5"
    assert glue_command(Path("m"), Path("o"), {"dir": "hub"})[3:] == ["glue", "--model", "m", "--out", "o"]


def test_asked_for_scores_every_export_of_a_run_is_fine_tuned(
    fail_layers: list[int], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(command: list[str], log: Path) -> int:
        if "glue" not in command:
            return launch.run_logged(command, log)
        options = dict(zip(command[4::2], command[5::2]))
        assert options["--glue-dir"] == str(tmp_path)
        assert options["--max-steps"] == "2"  # the scale's
        scored.append(options["--model"])
        return 0

    scored: list[str] = []
    monkeypatch.setattr(study_run, "run_logged", answer)
    monkeypatch.setattr(scores, "run_logged", answer)
    study = tmp_path / "study"
    half_way = study / "alone-s42" / "export" / "step_00000006"
    half_way.mkdir(parents=True)
    arguments = ["study", "remapping", "--out", str(study), f"data.dir={tiny_data}"]
    assert main([*arguments, "--glue", str(tmp_path)]) == 0
    runs = [run.name for run in load_grid("remapping", "smoke").runs]
    assert sorted(scored) == sorted([str(half_way), *(str(study / name / "export") for name in runs)])


# `starts` differs from `remapping` by the method alone; each method is tested with the models, and here time is short.
OTHERS = [pytest.param(each, marks=pytest.mark.slow) for each in grid_names() if each not in ("remapping", "starts")]


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all grids, as `dwt-ds study` has it by default: what they have in common runs once."""
    return tmp_path_factory.mktemp("study")


@pytest.mark.timeout(1800)  # some twenty starts of the launcher
@pytest.mark.parametrize("name", ["remapping", *OTHERS])
def test_a_packaged_grid_runs_at_smoke_scale(name: str, tiny_data: Path, shared_folder: Path) -> None:
    settings = [f"data.dir={tiny_data}", "student.max_positions=32", "train.max_steps=2"]
    assert main(["study", name, "--out", str(shared_folder), "--ranks", "1", *settings]) == 0
    for run in load_grid(name, "smoke").runs:
        assert (shared_folder / run.name / "export" / "model.safetensors").is_file()
    assert main(["report", str(shared_folder)]) == 0
