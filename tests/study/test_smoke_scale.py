"""The packaged grids, run with the real pre-training at the smallest scale."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from harness.ranks import Run

from dwt_ds.cli.main import main
from dwt_ds.study import run as study_run
from dwt_ds.study.grid import grid_names, load_grid

ALONE = {"runs": [{"teacher": "none"}]}
# `starts` would be fifteen more runs; FEW_STARTS has one of each kind.
OTHERS = [pytest.param(each, marks=pytest.mark.slow) for each in grid_names() if each != "starts"]
FEW_STARTS = {
    "runs": [{"teacher": "teacher4", "start": "stack"}, {"teacher": "narrow4", "start": ["fna", "interlace+fna"]}]
}


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all grids, the default of `dwt-ds study`: the runs that they share run once."""
    return tmp_path_factory.mktemp("study")


@pytest.fixture
def without_launcher(run_ranks: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a study are forked ranks, one each."""

    def command(recipe: Path, overrides: Sequence[str], ranks: int) -> list[str]:
        assert ranks == 1
        return ["-m", "dwt_ds.pretrain", str(recipe), *overrides]

    def run_logged(words: list[str], log: Path, _: threading.Event) -> int:
        [ended] = run_ranks([words])
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(ended.out + ended.err)
        return ended.code

    monkeypatch.setattr(study_run, "pretrain_command", command)
    monkeypatch.setattr(study_run, "run_logged", run_logged)


def run_at_smoke_scale(grid: str, data: Path, folder: Path, ranks: int = 1) -> None:
    """Two steps a run; then all runs are finished, a second start accepts them, and the report can be written."""
    arguments = ["study", grid, "--out", str(folder), "--ranks", str(ranks), "train.max_steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("data").mkdir(exist_ok=True)
        for name in ("quickstart", "quickstart_own"):
            if not Path("data", name).exists():
                Path("data", name).symlink_to(data)
        assert main(arguments) == 0
        for run in load_grid(grid, "smoke").runs:
            assert (folder / run.name / "export" / "model.safetensors").is_file()
        assert main([*arguments, "--dry-run"]) == 0
        assert main(["report", str(folder)]) == 0


@pytest.mark.usefixtures("without_launcher")
@pytest.mark.parametrize("name", OTHERS)
def test_a_packaged_grid_runs_at_smoke_scale(name: str, tiny_data: Path, shared_folder: Path) -> None:
    run_at_smoke_scale(name, tiny_data, shared_folder)


@pytest.mark.slow
@pytest.mark.usefixtures("without_launcher")
def test_every_kind_of_start_runs_at_smoke_scale(tiny_data: Path, shared_folder: Path, tmp_path: Path) -> None:
    packaged = load_grid("starts", "smoke").runs
    grid = tmp_path / "few_starts.yaml"
    grid.write_text(yaml.safe_dump(FEW_STARTS), encoding="utf-8")
    assert {run.name for run in load_grid(str(grid), "smoke").runs} <= {run.name for run in packaged}
    run_at_smoke_scale(str(grid), tiny_data, shared_folder)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_processes_of_their_own_are_the_runs_of_a_study(ranks: int, tiny_data: Path, tmp_path: Path) -> None:
    """One rank by itself, two with DeepSpeed's launcher."""
    grid = tmp_path / "alone.yaml"
    grid.write_text(yaml.safe_dump(ALONE), encoding="utf-8")
    run_at_smoke_scale(str(grid), tiny_data, tmp_path, ranks)
