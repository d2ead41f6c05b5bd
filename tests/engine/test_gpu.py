"""What only a GPU can show: the Triton kernel inside a run, ZeRO with a GPU's Adam, a teacher with injected kernels or
as CUDA graphs, and fp16, which DeepSpeed does not have on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from harness.launcher import Launch
from harness.ranks import TESTS
from harness.runs import completed, logged_rows
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),  # so they begin first, beside the many short ones of the kernels
]

# Runs that differ in one setting, one after another in one process: to start takes longer than their 20 steps.
RUNS = """
import sys
from dwt_ds.base.locks import release_locks
from dwt_ds.base.quiet import quieten_libraries
from dwt_ds.engine.ranks import stop_ranks
from dwt_ds.pretrain import train
from dwt_ds.run.assemble import assemble
from dwt_ds.run.stop import StopRequest
quieten_libraries()
recipe, folder, values, *overrides = sys.argv[1:]
setting, _, values = values.partition("=")
for value in values.split(","):
    session = assemble(recipe, [*overrides, f"{setting}={value}", f"output_dir={folder}/{value}"], None, StopRequest())
    train(session)
    release_locks()
    session.student.destroy()
stop_ranks()
"""

ON_GPU = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"}
# Of losses of about 6 over 20 steps. In 16 bits each logit and gradient is rounded, at other places by either back end.
TOLERANCES = {"zero2_fp32": 1e-4, "zero2_bf16": 1e-2, "zero2_fp16": 2e-3}
SMALL_SCALE = "deepspeed.fp16.initial_scale_power=8"  # far from overflowing by itself
COMPILE_OFF = "train.compile=off"  # compiling takes longer than the rest of a run


def run_program(program: str, *words: str) -> str:
    """What a program prints that runs on the GPU, in a process of its own: this one's DeepSpeed is on the CPU."""
    command = [sys.executable, "-c", program, *words]
    ended = subprocess.run(command, env={**os.environ, **ON_GPU}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "device_id" not in ended.stderr, ended.stderr  # NCCL guesses no device
    return ended.stdout


class Runs(NamedTuple):
    printed: str
    losses: list[list[tuple[float, float]]]
    """Hard and soft loss of each step."""


def runs_by_value(recipe: Path, folder: Path, values: str, *overrides: str) -> Runs:
    """A run of 20 steps for each of the values in "setting=value,value"."""
    printed = run_program(RUNS, str(recipe), str(folder), values, "train.max_steps=20", *overrides)
    runs = [logged_rows(folder / value) for value in values.partition("=")[2].split(",")]
    assert all(rows[20]["skipped_steps"] == 0 for rows in runs)
    return Runs(printed, [[(row["hard_loss"], row["soft_loss"]) for row in rows.values()] for rows in runs])


@pytest.mark.parametrize("config", TOLERANCES)
def test_triton_and_torch_back_ends_train_alike(config: str, tiny_recipe: Path, tmp_path: Path) -> None:
    settings = [f"deepspeed_config={config}", "student.dropout=0", COMPILE_OFF]
    settings += [SMALL_SCALE] if config == "zero2_fp16" else []
    triton, torchs = runs_by_value(tiny_recipe, tmp_path, "distill.backend=triton,torch", *settings).losses
    close = TOLERANCES[config]
    torch.testing.assert_close(triton, torchs, rtol=close, atol=close)


def test_every_zero_stage_trains_alike(tiny_recipe: Path, tmp_path: Path) -> None:
    """With the Adam that a GPU has: without ZeRO, DeepSpeed wraps a fused one in a class of its own."""
    stages = "deepspeed_config=zero0,zero1,zero2_bf16,zero3"
    first, *others = runs_by_value(tiny_recipe, tmp_path, stages, "student.dropout=0", COMPILE_OFF).losses
    close = TOLERANCES["zero2_bf16"]
    for other in others:
        torch.testing.assert_close(other, first, rtol=close, atol=close)


def test_injected_kernels_are_tried_and_the_run_says_what_was_found(
    launch: Launch, tiny_recipe: Path, tmp_path: Path
) -> None:
    """By a run of its own, since nvcc compiles them for minutes at the first use."""
    settings = [f"output_dir={tmp_path}", "deepspeed_config=zero2_bf16", "teacher.kernel_inject=auto", COMPILE_OFF]
    text = completed(launch(1, [str(tiny_recipe), *settings], environment=ON_GPU, timeout_seconds=300))
    assert "layers injected, which moved the logits by" in text or "kernels not injected (" in text


def test_fp16_skips_steps_that_are_not_finite_and_lowers_its_scale(
    launch: Launch, tiny_recipe: Path, tmp_path: Path
) -> None:
    """The guard makes the gradient of such a loss NaN, whatever the scale (harness/faulty_pretrain.py)."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    settings = [f"output_dir={tmp_path}", "deepspeed_config=zero2_fp16", "train.max_steps=6"]
    settings += [SMALL_SCALE, COMPILE_OFF]
    fault = {"FAULT": "inf 0 3 4", "PYTHONPATH": path}
    arguments = {"module": "harness.faulty_pretrain", "environment": {**ON_GPU, **fault}, "timeout_seconds": 300}
    completed(launch(1, [str(tiny_recipe), *settings], **arguments))
    rows = logged_rows(tmp_path)
    assert [rows[step]["skipped_steps"] for step in range(1, 7)] == [0, 0, 1, 2, 2, 2]
    assert rows[2]["loss_scale"] == 256
    assert rows[6]["loss_scale"] < 256
    assert [json.loads(line)["step"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [3, 4]
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "export" / "model.safetensors").values())


GRAPHS = """
import sys
import torch
from dwt_ds.data.batches import Batch
from dwt_ds.engine.cuda_graphs import EAGER_CALLS, CudaRecorder, use_a_stream_that_can_be_recorded
from dwt_ds.engine.ranks import device, start_ranks, stop_ranks
from dwt_ds.engine.teacher import TeacherEngine
start_ranks()
use_a_stream_that_can_be_recorded()


def teacher(recorder):
    settings = {"dtype": sys.argv[2], "kernel_inject": False, "device": device(), "seq_len": 32}
    made = TeacherEngine(sys.argv[1], **settings, recorder=recorder)
    made.start()
    return made


def batch(rows, seed, padded=False):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 90, (rows, 32), generator=draw)
    mask = torch.ones_like(tokens) if padded else None
    if padded:
        mask[::2, 20 + seed % 10 :] = 0
    positions = torch.randperm(tokens.numel(), generator=draw)[: 5 * rows].sort().values
    return Batch(tokens, mask, positions, positions, tokens.numel(), torch.arange(rows)).to(device())


plain = teacher(None)
plain(batch(8, 0))
torch.cuda.empty_cache()
before = torch.cuda.memory_allocated()
graphed = teacher(CudaRecorder())
numbers = torch.cuda.get_rng_state()
calls = [*[(8, False)] * (EAGER_CALLS + 4), (3, False), *[(8, True)] * (EAGER_CALLS + 3), (3, False), (8, False)]
for seed, (rows, padded) in enumerate(calls):
    given = batch(rows, seed, padded)
    torch.testing.assert_close(graphed(given).hidden, plain(given).hidden, msg=f"call {seed}")
recorded = graphed._graphs._graphs
assert len(recorded) == 2 and all(graph.is_checked for graph in recorded.values()), recorded
assert torch.equal(torch.cuda.get_rng_state(), numbers), "the student's dropout would draw other numbers"
assert any(each["segment_pool_id"] != (0, 0) for each in torch.cuda.memory_snapshot())
del recorded, given
graphed.release()
assert all(each["segment_pool_id"] == (0, 0) for each in torch.cuda.memory_snapshot()), "the graphs' pool is there"
assert torch.cuda.memory_allocated() <= before, (torch.cuda.memory_allocated(), before)
stop_ranks()
"""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_recorded_teacher_says_the_same_and_is_freed_when_released(dtype: str, tiny_teacher: Path) -> None:
    """Uneven last batches and padded ones included."""
    run_program(GRAPHS, str(tiny_teacher), dtype)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], id="compiled"),
        pytest.param(["student.family=roberta", "train.gradient_accumulation_steps=2", COMPILE_OFF], id="roberta"),
        pytest.param(["student.family=distilbert", "deepspeed_config=zero2_fp16", SMALL_SCALE, COMPILE_OFF], id="fp16"),
    ],
)
def test_a_run_with_cuda_graphs_trains_as_one_without(settings: list[str], tiny_recipe: Path, tmp_path: Path) -> None:
    """Beside ZeRO-2, dropout, compiled layers and a loader that pins memory while passes are recorded."""
    values = "train.cuda_graphs=off,auto"
    printed, (without, graphs) = runs_by_value(tiny_recipe, tmp_path, values, "train.eval_every=5", *settings)
    torch.testing.assert_close(graphs, without, rtol=1e-4, atol=1e-4)
    assert "is replayed as CUDA graphs" in printed
    assert "is not replayed" not in printed


# From its 10th step on, when every pass is recorded, a step ends with an error where the host waits for the device
# other than for an event.
WITHOUT_WAITS = """
import sys
import torch
from dwt_ds.pretrain import main
from dwt_ds.run.session import Session
steps = Session.steps, Session.end_step

def begun(self):
    for step in steps[0](self):
        torch.cuda.set_sync_debug_mode("error" if 9 <= step < self.total_steps - 1 else "default")
        yield step

def ended(self, numbers):
    if numbers.step == self.total_steps - 1:
        torch.cuda.set_sync_debug_mode("default")  # it evaluates, saves and exports
    steps[1](self, numbers)

Session.steps, Session.end_step = begun, ended
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("config", ["zero1", "zero2_bf16"])
def test_between_logged_steps_the_host_waits_for_events_only(config: str, tiny_recipe: Path, tmp_path: Path) -> None:
    settings = [f"deepspeed_config={config}", "train.max_steps=16", "train.log_every=100", "train.eval_every=0"]
    settings += ["data.label_draw=fixed", f"output_dir={tmp_path}", COMPILE_OFF]
    run_program(WITHOUT_WAITS, str(tiny_recipe), *settings, "train.checkpoint_every=0")
