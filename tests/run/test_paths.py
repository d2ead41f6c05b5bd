"""Whole runs in folders with odd names, behind links, and two at once in one folder."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from harness.ranks import Start, Train
from harness.runs import completed, logged_rows
from harness.tiny import TinyRun
from harness.waiting import wait_until
from safetensors.torch import load_file

from dwt_ds.cli.main import main
from dwt_ds.export.verify import verify

# Each with the name of another folder that it matches as a pattern.
NAMES = {
    "b[12]": "b1",
    "-x *? {a}": "-x yz {a}",
    'it\'s "$HOME" `id` #1: ü 日本 (+)': "beside",
    "[!a]~%s\\n": "b~%s\\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_exported_and_resumed_in_a_folder_of_any_name(
    name: str, train: Train, tiny_recipe: Path, tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Data, teacher and recipe lie in such a folder, too."""
    run, beside = tmp_path / name / "run", tmp_path / NAMES[name] / "run"
    data, teacher = tmp_path / name / "data", tmp_path / name / "teacher"
    shutil.copytree(tiny_data, data)
    shutil.copytree(tiny_teacher, teacher)
    recipe = shutil.copy(tiny_recipe, tmp_path / name / "recipe.yaml")
    settings = [str(recipe), f"data.dir={data}", f"teacher.path={teacher}", f"output_dir={run}"]
    completed(train(1, [*settings, "train.max_steps=2", "seed=8"]))
    shutil.copytree(run, beside)
    for shard in (beside / "checkpoints").rglob("*.pt"):
        shard.write_bytes(b"other weights")

    assert main(["export", str(run), "--out", str(tmp_path / name / "out")]) == 0
    ours, runs = load_file(tmp_path / name / "out" / "model.safetensors"), load_file(run / "export/model.safetensors")
    assert all(ours[key].equal(runs[key]) for key in runs)
    for ranks, length in ((1, 3), (2, 4)):
        output = completed(train(ranks, [*settings, f"train.max_steps={length}", "seed=8"]))
        assert f"resuming from {run}/checkpoints/step_0000000{length - 1} at step {length - 1}" in output
    assert list(logged_rows(run)) == [1, 2, 3, 4]
    assert not [finding.problems for finding in verify(run) if finding.problems]
    assert main(["report", str(run)]) == 0
    assert (run / "report" / "index.html").is_file()


@pytest.mark.slow
def test_a_run_behind_links_writes_through_them_at_every_start(tiny_run: TinyRun, tmp_path: Path) -> None:
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    run.symlink_to(scratch / "run")
    (scratch / "run").mkdir(parents=True)
    for name in ("export", "checkpoints"):
        (run / name).symlink_to(scratch / name)
    for length in (2, 3):
        tiny_run(run, f"train.max_steps={length}")
    assert run.is_symlink()
    for name in ("export", "checkpoints"):
        assert (run / name).is_symlink()
    assert not [finding.problems for finding in verify(run) if finding.problems]
    assert sorted(path.name for path in scratch.iterdir()) == ["checkpoints", "export", "run"]
    assert "step_00000003" in os.listdir(scratch / "checkpoints")


@pytest.mark.slow
def test_the_second_of_two_runs_in_a_folder_is_refused_and_a_kill_frees_it(
    tiny_run: TinyRun, start_ranks: Start, tiny_recipe: Path, tmp_path: Path
) -> None:
    """With loader processes, which are forks of the ranks and outlive them for seconds."""
    run = tmp_path / "run"
    settings = ["train.checkpoint_every=2", "data.workers=1"]
    words = ["-m", "dwt_ds.pretrain", str(tiny_recipe), f"output_dir={run}", *settings, "train.max_steps=100000"]
    first = start_ranks([words] * 2)
    wait_until(lambda: any((run / "checkpoints").glob("step_*[0-9]")), first)
    output = tiny_run(run, *settings, "seed=9", code=2)
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    rank_0 = first.processes[0].pid
    assert line.startswith(f"error: output_dir={str(run)!r}: process {rank_0} on host "), line
    assert "has been writing there since" in line
    assert first.running()

    for process in first.processes:
        os.kill(process.pid, signal.SIGKILL)
    last = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*[0-9]"))
    assert "resuming from" in tiny_run(run, *settings, f"train.max_steps={last + 10}", ranks=2)
    assert max(logged_rows(run)) == last + 10
    assert not (run / ".writer").exists()


@pytest.mark.slow
def test_a_recipe_in_the_runs_folder_is_refused_before_anything_is_written(
    train: Train, tiny_recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tiny_recipe, run / "config.yaml")
    with open(run / "config.yaml", "a", encoding="utf-8") as file:
        file.write("# mine\n")
    mine = (run / "config.yaml").read_bytes()
    settings = [str(run / "config.yaml"), f"output_dir={run}", "train.max_steps=2"]
    code, output = train(1, settings)
    assert (code, os.listdir(run)) == (2, ["config.yaml"]), output
    assert "error: output_dir=" in output
    assert "the run would replace config.yaml, which no run wrote there" in output
    assert (run / "config.yaml").read_bytes() == mine

    (run / "config.yaml").rename(run / "mine.yaml")
    completed(train(1, [str(run / "mine.yaml"), *settings[1:]]))
    assert (run / "mine.yaml").read_bytes() == mine
    # What the run wrote gives that run again.
    completed(train(1, [str(run / "config.yaml"), "train.max_steps=3"]))
    assert list(logged_rows(run)) == [1, 2, 3]
