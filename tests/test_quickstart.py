"""The first command of the README: with runs of four steps, and what it takes for a finished run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwt_ds import quickstart
from dwt_ds.run.folder import RunFolder

SHORT = ["train.max_steps=4", "train.log_every=2", "train.eval_every=2", "train.eval_rows=16"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_trains_teacher_and_students_and_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = {name: [*words, *SHORT] for name, words in quickstart.RUN_RECIPES.items()}
    monkeypatch.setattr(quickstart, "RUN_RECIPES", overrides)
    assert quickstart.main() == 0
    said = capfd.readouterr().out
    table = said[said.index("model       held-out MLM loss") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["teacher", "alone", "distilled"]
    assert all(8 < float(line.split()[1]) < 10 for line in table[1:4]), "near log(8000) after four steps"
    assert "[MASK] = " in said
    assert (tmp_path / "runs" / "quickstart" / "curves.png").stat().st_size > 10_000
    for name, teacher in (("teacher", None), ("alone", None), ("distilled", "runs/quickstart/teacher/export")):
        run = tmp_path / "runs" / "quickstart" / name
        assert (run / "complete.json").is_file()
        assert yaml.safe_load((run / "config.yaml").read_text())["teacher"]["path"] == teacher
    # The data are kept for the next start.
    capfd.readouterr()
    assert quickstart.main() == 0
    said = capfd.readouterr().out
    assert "dwt-ds prepare" not in said
    assert said.count("already finished at step 4") == 3


@pytest.mark.parametrize("answer", ["complete", "stopped", "failed after an earlier run"])
def test_quickstart_looks_at_the_run_and_not_at_the_launchers_word(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("runs/one")
    folder.path.mkdir(parents=True)
    code = {"complete": 1, "stopped": 0, "failed after an earlier run": 2}[answer]
    if answer != "stopped":
        folder.finish(4)
    if answer == "failed after an earlier run":
        os.utime(folder.path / "complete.json", (1e9, 1e9))

    def launch(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if answer == "complete":
            folder.finish(4)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(quickstart.subprocess, "run", launch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if answer == "complete":
        quickstart._train(folder, [])
        return
    with pytest.raises(SystemExit, match=rf"^error: runs/one is not complete \(exit code {code}\)"):
        quickstart._train(folder, [])
