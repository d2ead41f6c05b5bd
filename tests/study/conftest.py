"""A stand-in for the pre-trainings of a study."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from dwt_ds.engine.ds_json.resolve import resolved_recipe
from dwt_ds.plan.settings import resolve_plan
from dwt_ds.study import figures
from dwt_ds.study import run as study_run
from dwt_ds.study.estimate import Cost

# Stands for a pre-training: complete at once, or ending with the given exit code.
STAND_IN = """
import json, pathlib, sys
folder, config, ds_config, identity, code = pathlib.Path(sys.argv[1]), *sys.argv[2:]
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write("started\\n")
if code != "0":
    print("no luck")
    sys.exit(int(code))
(folder / "config.yaml").write_text(config)
(folder / "ds_config.json").write_text(ds_config)
(folder / "run.json").write_text(identity)
(folder / "metrics.jsonl").write_text(json.dumps({"step": 12, "eval_hard_loss": 5.5, "eval_soft_loss": 0.1}) + "\\n")
(folder / "export").mkdir(exist_ok=True)
(folder / "complete.json").write_text('{"steps": 12}')
"""


@pytest.fixture
def exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[int, int]:
    """Exit codes of runs by their student's layers, where not 0; nothing is trained."""
    program, codes = tmp_path / "stand_in.py", dict[int, int]()
    program.write_text(STAND_IN, encoding="utf-8")

    def command(recipe: Path, overrides: Sequence[str], ranks: int) -> list[str]:
        settings = resolve_plan(str(recipe), list(overrides), None, ranks)
        config, identity = settings.config, {"data": settings.corpus.fingerprint}
        resolved = resolved_recipe(config, settings.ds_values, settings.total_steps)
        files = [yaml.safe_dump(resolved), json.dumps(settings.ds_values), json.dumps(identity)]
        return [sys.executable, str(program), config.output_dir, *files, str(codes.get(config.student.layers, 0))]

    monkeypatch.setattr(study_run, "pretrain_command", command)
    # Hours of runs that take none.
    monkeypatch.setattr(study_run, "estimate", lambda runs, *_: {run.name: Cost(12, 1.0, 1.0, 1.0) for run in runs})
    return codes


@pytest.fixture
def remapping(tiny_data: Path, tmp_path: Path) -> list[str]:
    """The words of `dwt-ds study` for a packaged grid of four runs, in the folder `study`."""
    return ["study", "remapping", "--out", str(tmp_path / "study"), f"data.dir={tiny_data}"]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not drawn, which takes longer than the rest of a report; their files hold one dot."""

    def save(figure: Figure, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("1", (1, 1)).save(path)
        plt.close(figure)
        return path

    monkeypatch.setattr(figures, "save", save)
