"""Kills, signals, full disks and bad numbers done to real ranks; each run then goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from harness.launcher import Launch
from harness.mounts import mounted
from harness.ranks import OUTLIVED, TESTS, Train
from harness.runs import assert_same_run, completed, logged_rows, untimed_rows
from harness.tiny import TinyRun
from harness.waiting import wait_until
from safetensors.torch import load_file

from dwt_ds.engine.build_locks import TORCHS_LOCKS_END
from dwt_ds.engine.checkpoint.weights import checkpoint_fp32_weights

# Dropout on, accumulation, an epoch's end inside the run.
SETTINGS = [
    "train.checkpoint_every=4",
    "train.gradient_accumulation_steps=2",
    "student.dropout=0.2",
    "distill.soft_weight={schedule: linear, start: 4, end: 1}",
]
# From the death of a rank to the end of the launcher, and of a save after a signal: a bound on a hang, many times what
# either takes on a quiet machine.
BOUND_SECONDS = 120.0


Faulty = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def faulty(train: Train, tiny_recipe: Path) -> Faulty:
    """`faulty(fault, folder, *settings)` is a run of `tiny_recipe` with a fault (harness/faulty_pretrain.py), on two
    ranks unless told otherwise; exit code and output."""

    def start_faulty(fault: str, folder: Path, *settings: str, ranks: int = 2) -> tuple[int, str]:
        arguments = [str(tiny_recipe), f"output_dir={folder}", *settings]
        return train(ranks, arguments, program=["-m", "harness.faulty_pretrain"], environment={"FAULT": fault})

    return start_faulty


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_every_stage_of_a_save(
    tiny_run: TinyRun, launch: Launch, faulty: Faulty, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Each kill comes at the next checkpoint of the same run; at the end it equals the run that nothing happened to.

    The first is under the launcher. Ranks that are left must end by themselves.
    """
    kills = [(stage, who) for stage in ("before", "shards", "manifest", "pointer") for who in ("0", "1", "all")]
    settings = [*SETTINGS, f"train.max_steps={4 * len(kills) + 6}", "train.log_every=2"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    tiny_run(straight, *settings, ranks=2)

    saved, path = None, os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    for number, (stage, who) in enumerate(kills):
        step = 4 * (number + 1)
        fault = f"kill {stage} {who} {step}"
        if number == 0:
            arguments = [str(tiny_recipe), f"output_dir={run}", *settings]
            how = {"module": "harness.faulty_pretrain", "environment": {"FAULT": fault, "PYTHONPATH": path}}
            code, output = launch(2, arguments, timeout_seconds=BOUND_SECONDS, **how)
        else:
            code, output = faulty(fault, run, *settings)
        assert code != 0, f"{stage} {who}: all is said to be well\n{output}"
        assert OUTLIVED not in output
        if saved is not None:
            expected = f"step_{saved:08d} at step {saved}" if saved else "beginning at step 0"
            assert expected in output, output
        saved = max([0, *(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*[0-9]"))])
        if (stage, who) != ("manifest", "1"):  # rank 0, which works on alone then, may come to the end of it
            # A folder that has its name is complete, whether or not the pointer was replaced.
            assert saved == (step if stage == "pointer" else step - 4)
    tiny_run(run, *settings, ranks=2)
    assert_same_run(run, straight)
    assert not list((run / "checkpoints").glob("*.tmp")), "half-written folders are left"


def test_a_kill_in_an_evaluation_loses_neither_that_nor_the_export(
    tiny_run: TinyRun, faulty: Faulty, tmp_path: Path
) -> None:
    settings = ["train.max_steps=8", "train.checkpoint_every=4", "train.eval_every=4", "train.export_every=2"]
    code, output = faulty("evaluation all 4", tmp_path, *settings)
    assert code == -signal.SIGKILL, output
    assert "at step 4" in tiny_run(tmp_path, *settings, ranks=2)
    exports = sorted((tmp_path / "export").glob("step_*"))
    assert [path.name for path in exports] == ["step_00000002", "step_00000004", "step_00000006"]
    assert "held-out" in (exports[1] / "README.md").read_text()
    saved = checkpoint_fp32_weights(tmp_path / "checkpoints" / "step_00000004")
    exported = load_file(exports[1] / "model.safetensors")
    assert all(weights.equal(saved[f"student.model.{name}"]) for name, weights in exported.items())


@pytest.mark.usefixtures("hears_hangups")
@pytest.mark.slow
def test_stopped_by_signals_wherever_they_come(tiny_run: TinyRun, faulty: Faulty, tmp_path: Path) -> None:
    """At the start, in training and in validation, to one rank or all: each start saves, ends with 0, and is gone on
    from; the run equals the undisturbed one."""
    stops = [
        ("SIGTERM", "start", "1", 0),
        ("SIGTERM", "training", "all", 6),
        ("SIGTERM", "validation", "1", 8),
        ("SIGHUP", "training", "all", 14),
        ("SIGINT", "validation", "all", 16),
    ]
    settings = [*SETTINGS, "train.max_steps=20", "train.eval_every=2", "train.eval_rows=null", "train.log_every=2"]
    settings += ["train.checkpoint_every=0", "data.workers=1"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    tiny_run(straight, *settings, ranks=2)
    for number, place, who, step in stops:
        output = completed(faulty(f"signal {number} {place} {who}", run, *settings))
        assert f"stopped at step {step}/20 ({number})" in output
        assert not (run / "complete.json").exists()
        assert (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").is_file()
    tiny_run(run, *settings, ranks=2)
    assert_same_run(run, straight)
    card = (run / "export" / "README.md").read_text()
    assert "step 14" in card, "the card tells of the starts"


def start_script(recipe: Path, output: Path, *settings: str) -> subprocess.Popen[str]:
    """launchers/run_local.sh on two ranks, in a session of its own."""
    programs = Path(sys.executable).parent
    script = TESTS.parent / "launchers" / "run_local.sh"
    environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "RANKS": "2", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [str(script), str(recipe), f"output_dir={output}", *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_metrics(run: Path, process: subprocess.Popen[str]) -> None:
    """Until the first step is logged."""
    metrics = run / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or (metrics.is_file() and metrics.read_text()), seconds=300)
    assert process.poll() is None, process.communicate()[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_launch_script_passes_signals_on(number: signal.Signals, tiny_recipe: Path, tmp_path: Path) -> None:
    process = start_script(tiny_recipe, tmp_path, "train.max_steps=100000")
    wait_for_metrics(tmp_path, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=BOUND_SECONDS)
    assert process.returncode == 75, output
    assert "request of the launcher" in output
    step = int((tmp_path / "checkpoints" / "latest").read_text().split("_")[1])

    process = start_script(tiny_recipe, tmp_path, f"train.max_steps={step + 2}")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"at step {step}" in output
    assert "changed since that checkpoint: train.max_steps: 100000 -> " in output


@pytest.mark.usefixtures("hears_hangups")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_run_whose_output_nobody_reads_any_more_saves(
    number: signal.Signals, tiny_recipe: Path, tmp_path: Path
) -> None:
    """A Ctrl-C ends the `tee` behind a run as well, and a closed terminal takes what is printed."""
    process = start_script(tiny_recipe, tmp_path, "train.max_steps=100000")
    wait_for_metrics(tmp_path, process)
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(number)
    assert process.wait(BOUND_SECONDS) == 75
    assert (tmp_path / "checkpoints" / "latest").is_file()


@pytest.mark.slow
def test_ranks_stop_when_their_launcher_has_died(tiny_recipe: Path, tmp_path: Path) -> None:
    process = start_script(tiny_recipe, tmp_path, "train.max_steps=100000")
    wait_for_metrics(tmp_path, process)
    below = psutil.Process(process.pid).children(recursive=True)
    [launcher] = [p for p in below if "deepspeed.launcher.launch" in p.cmdline()]
    launcher.kill()
    output, _ = process.communicate(timeout=BOUND_SECONDS)
    assert process.returncode == 75, output
    assert "death of the launcher" in output
    assert not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert (tmp_path / "checkpoints" / "latest").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "said"), [("full", "No space left on device"), ("gone", "Input/output error")])
def test_a_disk_that_fails_fails_the_save_and_not_the_run(
    fault: str, said: str, faulty: Faulty, tmp_path: Path
) -> None:
    """On one rank of two: the others must not wait for it."""
    output = completed(faulty(f"{fault} 1 4", tmp_path, "train.max_steps=8", "train.checkpoint_every=2"))
    assert "step 4/8  CHECKPOINT NOT SAVED: rank 1: " in output
    assert said in output
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step_00000006", "step_00000008"]


@pytest.mark.slow
def test_old_checkpoints_that_cannot_be_deleted_stay(faulty: Faulty, tmp_path: Path) -> None:
    """The error is one rank's, and what it saves later would wait for the others."""
    output = completed(faulty("undeleted", tmp_path, "train.max_steps=8", "train.checkpoint_every=2"))
    assert output.count("checkpoint saved") == len(list((tmp_path / "checkpoints").glob("step_*"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"), [("size=3m", r"\([0-3] MB free there\)"), ("ro", "Read-only file system")]
)
def test_checkpoints_on_a_tiny_or_read_only_file_system(
    options: str, said: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    # Weights and optimizer of this student take about 12 MB.
    larger = ["student.hidden_size=256", "student.layers=1", "train.max_steps=4", "train.checkpoint_every=2"]
    with mounted(checkpoints, options):
        output = tiny_run(tmp_path, *larger, ranks=2)
        assert not list(checkpoints.iterdir())
    assert output.count("CHECKPOINT NOT SAVED") == 2, output
    assert re.search(said, output), output[-3000:]
    assert (tmp_path / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        pytest.param("zero2_fp32", [], marks=pytest.mark.slow, id="zero2_fp32"),
        pytest.param("zero2_bf16", [], id="zero2_bf16"),
        pytest.param("zero0", ["deepspeed.bf16.enabled=false"], id="zero0_fp32"),
        pytest.param("zero0", [], marks=pytest.mark.slow, id="zero0_bf16"),
    ],
)
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    config: str, overrides: list[str], faulty: Faulty, tmp_path: Path
) -> None:
    completed(faulty("inf 1 3 4", tmp_path, "train.max_steps=6", f"deepspeed_config={config}", *overrides))
    rows = logged_rows(tmp_path)
    assert [rows[step]["skipped_steps"] for step in range(1, 7)] == [0, 0, 1, 2, 2, 2]
    # The rate is that of the step that was skipped until one is taken again.
    rates = [rows[step]["learning_rate"] for step in range(1, 7)]
    assert rates[2] == rates[3] == rates[4] != rates[5]
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert skipped == [
        {"step": 3, "first_row": 16, "rows": 8, "epoch": 0},
        {"step": 4, "first_row": 24, "rows": 8, "epoch": 0},
    ]
    assert all(row["loss"] is not None for step, row in rows.items() if step in (1, 2, 5, 6))
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "export" / "model.safetensors").values())


def test_too_many_skipped_steps_end_the_run(faulty: Faulty, tmp_path: Path) -> None:
    settings = ["train.max_steps=30", "train.skip_window=10", "train.max_skipped_share=0.2"]
    code, output = faulty("inf 0 5 7 8 9 20", tmp_path, *settings)
    assert code == 3, output
    assert output.count("error: 3 of the last 8 steps were skipped, train.max_skipped_share=0.2") == 1
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "checkpoints" / "step_00000008").is_dir()


def test_a_loss_spike_is_skipped(faulty: Faulty, tmp_path: Path) -> None:
    settings = ["train.max_steps=12", "train.spike_window=4", "train.spike_sigma=6"]
    completed(faulty("spike all 9", tmp_path, *settings))
    rows = logged_rows(tmp_path)
    assert [rows[step]["skipped_steps"] for step in (8, 9, 12)] == [0, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "stage", "precision"),
    [(2, 1, 2, "fp32"), (1, 2, 2, "fp32"), (4, 2, 2, "fp32"), (2, 1, 1, "fp32"), (1, 2, 1, "bf16"), (2, 1, 2, "bf16")],
)
def test_another_number_of_ranks_resumes_with_the_same_losses(
    before: int, after: int, stage: int, precision: str, tiny_run: TinyRun, faulty: Faulty, tmp_path: Path
) -> None:
    """The same global batch of 16 rows, dropout off: data order, masks, optimizer and losses go on as they were."""

    def settings(ranks: int) -> list[str]:
        batch = ["train.micro_batch_size=4", f"train.gradient_accumulation_steps={4 // ranks}"]
        fixed = ["student.dropout=0", "train.max_steps=12", "train.eval_every=5"]
        return [*batch, *fixed, f"deepspeed_config=zero2_{precision}", f"deepspeed.zero_optimization.stage={stage}"]

    tiny_run(tmp_path / "straight", *settings(before), ranks=before)
    completed(faulty("signal SIGTERM training all", tmp_path / "changed", *settings(before), ranks=before))
    output = tiny_run(tmp_path / "changed", *settings(after), ranks=after)
    assert f"written by {before} ranks: optimizer state re-sharded" in output
    straight, changed = untimed_rows(tmp_path / "straight"), untimed_rows(tmp_path / "changed")
    assert [row["step"] for row in straight] == [row["step"] for row in changed]
    # In bf16 other sums of micro-batches are other roundings.
    close = 1e-5 if precision == "fp32" else 1e-2
    for ours, theirs in zip(changed, straight, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], abs=close), (ours["step"], name)
    assert not list((tmp_path / "changed" / "checkpoints").glob("*.universal"))


@pytest.mark.skipif(TORCHS_LOCKS_END, reason="this torch's own locks end with their process")
def test_the_lock_of_a_killed_build_is_named(train: Train, tiny_recipe: Path, tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1e9, 1e9))
    settings = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    arguments = [str(tiny_recipe), f"output_dir={tmp_path}", "deepspeed_config=zero2_offload"]
    code, output = train(2, arguments, environment=settings)
    assert code != 0
    assert f"{lock}: left by a build that was killed" in output


def test_a_stuck_rank_is_named_and_the_run_ends(faulty: Faulty, tmp_path: Path) -> None:
    limits = ["train.report_stuck_after_seconds=3", "train.collective_timeout_seconds=8", "train.max_steps=9"]
    code, output = faulty("hang 1 4", tmp_path, *limits)
    assert code != 0
    assert "no step has ended for 3 s (3 done)" in output
    assert re.search(r"rank 1 on \S+ keeps the others waiting at pretrain.py:\d+ train", output)
    waiting = json.loads((tmp_path / "stuck" / "rank_00000.json").read_text())
    late = json.loads((tmp_path / "stuck" / "rank_00001.json").read_text())
    assert late["elsewhere"]
    assert not waiting["elsewhere"]
    assert waiting["collectives_begun"] > late["collectives_begun"] > 0
    remembered = json.loads((tmp_path / "stuck" / "rank_00000.collectives.json").read_text())["entries"]
    assert remembered[-1]["profiling_name"] == "gloo:all_reduce"


def test_a_crash_below_python_says_where(faulty: Faulty, tmp_path: Path) -> None:
    code, output = faulty("signal SIGSEGV training 0", tmp_path, "train.max_steps=8", ranks=1)
    assert code != 0
    assert "Fatal Python error: Segmentation fault" in output
    assert re.search(r'pretrain\.py", line \d+ in train', output), output


def test_a_run_that_keeps_every_so_many_steps(tiny_run: TinyRun, tmp_path: Path) -> None:
    settings = ["train.checkpoint_every=1", "train.keep_last=1", "train.keep_every=3", "train.max_steps=7"]
    tiny_run(tmp_path, *settings)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_00000003", "step_00000006", "step_00000007"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["keep_every"] == 3
