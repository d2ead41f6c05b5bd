"""Fine-tunings of a study's exports: what is counted, refused and run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwt_ds.cli.main import main
from dwt_ds.launch.commands import run_logged
from dwt_ds.study import run as study_run
from dwt_ds.study import scores
from dwt_ds.study.grid import load_grid


def test_a_dry_run_counts_the_fine_tunings(
    exit_codes: dict[int, int],
    remapping: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    study = tmp_path / "study"
    scored = [*remapping, "--glue=~", "--dry-run"]
    assert main([*remapping, "--dry-run"]) == 0
    assert "fine-tunings" not in capsys.readouterr().out
    assert main(scored) == 0
    # Four runs of 12 steps with an export every 6; the smoke scale has one seed.
    assert "plus 56 fine-tunings (8 exports x 7 tasks x 1 seeds), not included in the hours" in capsys.readouterr().out

    assert main(remapping) == 0
    (study / "alone-s42" / "export" / "step_00000006").mkdir()
    results = study / "teacher4-s42" / "glue" / "step_00000012" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    assert main(scored) == 0
    # The stand-in keeps the last export only, but for the one above.
    assert "plus 28 fine-tunings (4 exports x 7 tasks x 1 seeds)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("glue", "message"),
    [
        ({"prescision": "fp32"}, "glue.prescision: unknown key"),
        ({"precision": "fp8"}, "glue.precision='fp8': must be"),
        ({"seeds": 0}, "glue.seeds=0: must be above 0"),
        ({"tasks": ["CoLA", "SST"]}, "'SST' is not a task of GLUE; did you mean 'SST-2'?"),
        ({"tasks": 7}, "glue.tasks=7: must be"),
    ],
)
def test_a_mistake_in_the_glue_section_stops_the_study_before_the_first_run(
    glue: dict[str, Any], message: str, tiny_data: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"runs": [{"teacher": "none"}], "glue": glue}))
    error = refusal("study", str(tmp_path / "mine.yaml"), f"data.dir={tiny_data}", "--dry-run")
    assert "mine.yaml: glue" in error
    assert message in error


def test_packages_for_fine_tuning_are_looked_for_before_the_first_run(
    tiny_data: Path, tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwt_ds.glue.options.find_spec", lambda name: None if name == "accelerate" else name)
    error = refusal("study", "teacher_quality", f"data.dir={tiny_data}", "--glue", str(tmp_path), "--dry-run")
    assert "needs accelerate; pip install 'dwt-ds[study]'" in error


def test_a_grids_glue_section_becomes_options_of_the_command() -> None:
    command = scores.glue_command(Path("m"), Path("o"), {"dir": "g", "tasks": ["CoLA", "MRPC"], "max_steps": 5})
    assert " ".join(command[3:]) == "glue --model m --out o --glue-dir g --tasks CoLA,MRPC --max-steps 5"
    command = scores.glue_command(Path("m"), Path("o"), {"dir": "hub", "quantize": None})
    assert " ".join(command[3:]) == "glue --model m --out o"


def test_with_glue_every_export_of_a_run_is_fine_tuned(
    exit_codes: dict[int, int], remapping: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(command: list[str], log: Path, stop: threading.Event) -> int:
        if "glue" not in command:
            return run_logged(command, log, stop)
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
    assert main([*remapping, "--glue", str(tmp_path)]) == 0
    runs = [run.name for run in load_grid("remapping", "smoke").runs]
    assert sorted(scored) == sorted([str(half_way), *(str(study / name / "export") for name in runs)])
