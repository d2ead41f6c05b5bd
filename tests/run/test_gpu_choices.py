"""What a run chooses on a GPU, by its settings alone: compiled layers, CUDA graphs, a loader process, work ahead."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.ranks import Python

from dwt_ds.config.schema import DataConfig
from dwt_ds.engine import ranks
from dwt_ds.plan.settings import resolve_plan
from dwt_ds.run import micro_batches
from dwt_ds.run.micro_batches import MicroBatches
from dwt_ds.run.models import compiles, may_replay_student, uses_graphs

PASSES = {
    # Compiled layers, the teacher's pass as a graph, the student's passes as graphs.
    "": (True, True, True),
    "train.compile=off": (False, True, True),
    "train.cuda_graphs=off": (True, False, False),
    "deepspeed_config=zero0": (True, True, False),
    "deepspeed_config=zero1": (True, True, False),
    "deepspeed_config=zero3": (False, False, False),
    "deepspeed_config=zero3 train.compile=layers": (True, False, False),
    "train.activation_checkpointing=true": (True, True, False),
    "student.quantization=w8a8": (True, True, False),
    "student.attention=flash_attention_2": (True, True, False),
    "distill.hidden_weight=0.5": (True, True, False),
    "deepspeed_config=zero2_fp32 deepspeed.torch_autocast.enabled=true deepspeed.torch_autocast.dtype=bf16": (
        True,
        True,
        False,
    ),
}


@pytest.mark.parametrize(("settings", "expected"), PASSES.items())
def test_how_passes_run(settings: str, expected: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve_plan("paper_weak", settings.split(), None, 1)
    found = []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(ranks, "device", lambda name=device: torch.device(name))
        found.append((compiles(resolved), uses_graphs(resolved), may_replay_student(resolved)))
    assert found == [expected, ("train.compile=layers" in settings, False, False)]


@pytest.mark.parametrize(("device", "setting", "processes"), [("cuda", "auto", 1), ("cpu", "auto", 0), ("cuda", 0, 0)])
def test_batches_come_from_a_process_of_their_own(
    device: str, setting: Any, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "device", lambda: torch.device(device))
    monkeypatch.setattr(MicroBatches, "_load", lambda self, first: self._workers)
    batches: Any = SimpleNamespace(without_teacher=lambda: None)
    meter: Any = None
    assert MicroBatches(batches, None, 0, 1, DataConfig(workers=setting), meter)._loader == processes


def test_loader_processes_that_cannot_be_started_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a semaphore

    monkeypatch.setattr(micro_batches, "step_loader", fail)
    batches: Any = SimpleNamespace(without_teacher=lambda: None)
    meter: Any = None
    with pytest.raises(OSError, match=r"^data.workers=1: .* cannot be started .*/dev/shm .* or set data.workers=0$"):
        MicroBatches(batches, None, 0, 1, DataConfig(workers=1), meter)


WAITS = """
import json, sys
from dwt_ds.engine import gradients
from dwt_ds.pretrain import main
from dwt_ds.run.micro_batches import MicroBatches

events = []
prefetch = MicroBatches.prefetch


class Copy(gradients.HostCopy):
    def number(self):
        events.append("norm")
        return super().number()


def noted(self):
    events.append("next pass")
    prefetch(self)


gradients.HostCopy, MicroBatches.prefetch = Copy, noted
code = main(sys.argv[1:])
print("EVENTS", json.dumps(events))
sys.exit(code)
"""


@pytest.mark.parametrize("stage", [1, 2])
def test_the_teachers_next_pass_starts_before_the_norm_is_read(
    stage: int, python: Python, tiny_recipe: Path, tmp_path: Path
) -> None:
    settings = ["train.max_steps=3", f"deepspeed.zero_optimization.stage={stage}", "deepspeed.bf16.enabled=true"]
    ended = python("-c", WAITS, str(tiny_recipe), f"output_dir={tmp_path}/run", *settings)
    assert ended.code == 0, ended.err
    [line] = [line for line in ended.out.splitlines() if line.startswith("EVENTS ")]
    assert json.loads(line.removeprefix("EVENTS ")) == ["next pass", "norm"] * 3
