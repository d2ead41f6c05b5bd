"""`dwt-ds watch` of folders as runs leave them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from harness.errors import Refusal
from harness.runs import rows_of
from harness.writers import Hold

from dwt_ds.base.locks import FolderLock, current_writer
from dwt_ds.base.software import host_name
from dwt_ds.cli.main import main
from dwt_ds.config.schema import RunConfig
from dwt_ds.run.progress import clock
from dwt_ds.study import watch
from dwt_ds.study.terminal_chart import block_curve
from dwt_ds.study.watch import lines_of, observe

STEPS = 40
PLENTY = SimpleNamespace(free=2**40)


def add(file: Path, *rows: dict[str, object]) -> None:
    with open(file, "a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)


def logged(step: int, loss: float | None) -> dict[str, object]:
    row = {"step": step, "loss": loss, "hard_loss": loss, "soft_loss": 0.5, "soft_weight": 1.0, "grad_norm": 1.0}
    rates = {"learning_rate": 1e-3, "tokens_per_second": 1000.0, "data_wait_share": 0.0}
    return row | rates | {"tokens": 100 * step, "elapsed_seconds": 2.0 * step}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two ranks at step 20 of 40, 2 s a step."""
    folder, config = tmp_path / "run", RunConfig().to_dict()
    folder.mkdir()
    config["train"] |= {"max_steps": STEPS}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    sizes = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    (folder / "ds_config.json").write_text(json.dumps(sizes))
    add(folder / "metrics.jsonl", *(logged(step, 9 - step / 10) for step in range(1, 21)))
    for step in (10, 20):
        add(folder / "metrics.jsonl", {"step": step, "eval_hard_loss": 9 - step / 10, "eval_soft_loss": 0.5})
    monkeypatch.setattr(watch.shutil, "disk_usage", lambda _: PLENTY)
    return folder


@pytest.fixture
def running(run: Path, hold: Hold) -> int:
    """A process that writes there; its id."""
    return hold(run)


def minutes_ago(run: Path, minutes: float) -> None:
    """Let all of the run's files be so old."""
    then = time.time() - 60 * minutes
    for file in run.iterdir():
        os.utime(file, (then, then))


def report_stuck(run: Path, rank: int, begun: int) -> None:
    (run / "stuck").mkdir(exist_ok=True)
    facts = {"rank": rank, "host": f"node{rank}", "place": "session.py:1 begin_step", "collectives_begun": begun}
    (run / "stuck" / f"rank_{rank:05d}.json").write_text(json.dumps({**facts, "elsewhere": False, "step": 20}))


def test_a_run_that_does_well(run: Path, running: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["watch", str(run)]) == 0, "the output is no terminal, so it does not wait"
    said = capsys.readouterr().out
    assert f"{run}  step 20 of 40 (50%)  running: process {running} on host {host_name()} since " in said
    assert said.splitlines()[0].endswith("ETA 40s")
    assert "step 20/40  loss 7.0000 = hard 7.0000 + 1 x soft 0.5000  lr 1.00e-03" in said
    assert "step 20  held-out: hard 7.0000" in said
    assert "training loss (hard)\n8.8 │█" in said
    assert "!" not in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "nothing is written there"


def test_losses_on_other_text_are_in_the_last_evaluation(run: Path) -> None:
    add(run / "metrics.jsonl", {"step": 21, "eval_hard_loss": 7.5, "eval_soft_loss": 0.5, "eval_hard_loss.books": 6.0})
    seen = observe(run)
    assert seen.last[-1] == "step 21  held-out: hard 7.5000, soft 0.5000; books 6.0000  lowest hard 7.0000 at step 20"
    assert [step for step, _ in seen.held_out] == [10, 20, 21]
    (run / "metrics.jsonl").unlink()
    add(run / "metrics.jsonl", {"step": 21, "eval_hard_loss.books": 6.0})
    seen = observe(run)
    assert seen.last[-1] == "step 21  held-out: books 6.0000"
    assert seen.held_out == []


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(
    ("step", "left"),
    [
        (12, 2 * (8 + 20 / 2)),  # 8 steps with the teacher, 20 of half the work
        (24, 1 * 16),  # the pace since the release, not that of the last ten rows
    ],
)
def test_the_time_left_counts_the_teacher_until_its_release(step: int, left: int, run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["teacher"]["path"] = "any"
    config["distill"]["soft_weight"] |= {"schedule": "linear", "start": 4.0, "end": 0.0, "span": 0.5}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").unlink()
    for done in range(1, step + 1):
        taught = done <= 20
        work = {"teacher_active": taught, "mfu": 0.4 if taught else 0.2, "mfu_student": 0.2}
        add(run / "metrics.jsonl", logged(done, 7.0) | work | {"elapsed_seconds": 2.0 * done - max(0, done - 20)})
    assert observe(run).state.endswith(f"ETA {clock(left)}")


@pytest.mark.usefixtures("running")
def test_in_a_terminal_it_follows_the_run_to_its_end(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            (run / "complete.json").write_text('{"steps": 40}')

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("dwt_ds.cli.watch.time.sleep", sleep)
    assert main(["watch", str(run), "--every", "0.5"]) == 0
    assert waited == [0.5, 0.5]
    assert capsys.readouterr().out.count("\x1b[H\x1b[J") == 3


def test_a_run_that_nobody_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / ".writer").write_text('{"host": "gone", "process": 1, "parent": 1, "since": "then"}')
    assert main(["watch", str(run), "--once"]) == 1
    assert "! the run is not complete and no process is running it; run the same command to resume" in (
        capsys.readouterr().out
    )
    (run / "complete.json").write_text('{"steps": 20}')
    seen = observe(run)
    assert (seen.complete, seen.problems) == (True, [])
    assert seen.state == f"{run}  step 20 of 20 (100%)  complete"


def test_it_fits_a_terminal(run: Path) -> None:
    seen = observe(run)
    whole = lines_of(seen, width=80)
    assert len(whole[1]) > 80, "as it is, where lines are read by a program"
    assert whole[3].startswith("! the run is not complete and no process is running it")
    lines = lines_of(seen, width=80, height=24)
    assert len(lines) < 24
    assert max(map(len, lines[1:])) <= 80
    assert " ".join(" ".join(lines).split()).count(" ".join(whole[1].split())) == 1
    assert len(lines_of(seen, width=120, height=50)) == len(whole)


def test_a_run_of_an_earlier_version(run: Path) -> None:
    rows = rows_of(run)
    (run / "metrics.jsonl").unlink()
    add(run / "metrics.jsonl", *({key: row[key] for key in row if key != "data_wait_share"} for row in rows))
    assert observe(run).last[0].endswith("1,000 tokens/s")


@pytest.mark.usefixtures("running")
def test_a_stuck_rank_is_named(run: Path) -> None:
    minutes_ago(run, 5)
    report_stuck(run, 0, begun=8)
    assert observe(run).problems == ["stuck: silent: rank 1; dead, stopped, or its disk does not answer"]
    report_stuck(run, 1, begun=8)
    assert observe(run).problems == ["stuck: all ranks wait in the same collective: look at the network"]
    report_stuck(run, 1, begun=7)
    assert observe(run).problems == ["stuck: rank 1 on node1 keeps the others waiting at session.py:1 begin_step"]
    time.sleep(0.02)
    add(run / "metrics.jsonl", logged(21, 6.9))
    assert observe(run).problems == [], "it goes on"


@pytest.mark.usefixtures("running")
def test_silence_is_measured_against_the_runs_own_pace(run: Path) -> None:
    minutes_ago(run, 0.9)
    assert observe(run).problems == []
    minutes_ago(run, 12)
    (problem,) = observe(run).problems
    assert problem.startswith("no new line for 12m00s; the longest pause so far was 2s: ")
    (run / "metrics.jsonl").unlink()
    assert observe(run).problems == ["no new line for 12m00s"]
    minutes_ago(run, 4)
    assert observe(run).problems == []


@pytest.mark.usefixtures("running")
def test_steps_that_were_skipped_lately(run: Path) -> None:
    add(run / "skipped.jsonl", {"step": 3, "first_row": 32, "rows": 16}, {"step": 19, "first_row": 288, "rows": 16})
    (problem,) = observe(run).problems
    assert problem.startswith("2 of the last 100 steps were skipped, the latest at step 19: ")
    add(run / "metrics.jsonl", logged(200, 5.0))
    seen = observe(run)
    assert seen.problems == []
    assert ", 2 skipped  " in seen.state


@pytest.mark.usefixtures("running")
def test_a_loss_that_is_not_finite_and_a_request_to_stop(run: Path) -> None:
    add(run / "metrics.jsonl", logged(21, None))
    assert observe(run).problems == ["the loss of step 21 is not finite"]
    assert "loss nan" in observe(run).last[0]
    (run / "stop").touch()
    assert observe(run).problems[0] == "it was asked to stop: it saves a checkpoint and ends"


@pytest.mark.usefixtures("running")
def test_a_disk_that_is_nearly_full(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    assert observe(run).problems == ["the disk is nearly full: 0.5 GiB free"]
    monkeypatch.setattr(watch.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**30))
    assert observe(run).problems == []
    weights = run / "checkpoints" / "step_00000010" / "weights"
    weights.parent.mkdir(parents=True)
    with open(weights, "wb") as file:
        file.truncate(2 * 2**30)
    (run / "checkpoints" / "step_00000020.tmp").mkdir()  # it is being written
    assert observe(run).problems == ["the disk is nearly full: 3.0 GiB free; a checkpoint takes 2.0 GiB"]


def test_a_run_that_has_not_taken_a_step(run: Path, running: int) -> None:
    (run / "metrics.jsonl").unlink()
    seen = observe(run)
    assert seen.last == ["no step is logged yet"]
    assert f"step 0 of 40 (0%)  running: process {running}" in seen.state


def test_a_folder_that_is_no_run(tmp_path: Path, refusal: Refusal) -> None:
    assert refusal("watch", tmp_path) == (
        f"error: {tmp_path}: holds no run (config.yaml); give the output_dir of one that has started\n"
    )


def test_asking_who_writes_does_not_end_the_lock(tmp_path: Path) -> None:
    """Closing any handle of a file ends a process's record locks on it."""
    assert current_writer(tmp_path) is None
    with FolderLock(tmp_path, "output_dir"):
        assert current_writer(tmp_path) == f"process {os.getpid()} on host {host_name()}"
        ask = (
            f"from pathlib import Path; from dwt_ds.base.locks import *; print(current_writer(Path({str(tmp_path)!r})))"
        )
        said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"process {os.getpid()} on host {host_name()} since ")
    assert current_writer(tmp_path) is None


def test_a_curve_in_blocks() -> None:
    assert block_curve([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0], width=7, height=2) == [
        "4 │█▃  ",
        "1 │██▆▁",
        "  └────",
        "   0step 3",
    ]
    assert block_curve([1, 5], [2.0, 2.0], width=5, height=1)[0] == "2 │▁▁"
