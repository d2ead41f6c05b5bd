"""Corners of the engine that a run of the usual settings never comes to.

16 bits without ZeRO and frozen parameters under ZeRO: what a step does, what is logged of it and what is exported.
Ranks that must not run ahead of others. What is deleted beside a damaged checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dwt_ds.engine import optimizers, teacher
from dwt_ds.engine.checkpoint import Retention, _delete_old
from dwt_ds.engine.ds_origin import Origin
from dwt_ds.engine.flight_recorder import collectives_begun
from dwt_ds.engine.optimizers import check_optimizer
from dwt_ds.engine.resume import newest_good
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.manifest_files import file_facts, write_manifest

ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

# Case -> precision, ZeRO stage, optimizer. Of torch's own, DeepSpeed's wrapper without ZeRO is the unfused one.
ADAM = {"type": "AdamW", "params": {"lr": 0.01}}
TORCH_ADAM = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
SGD = {"type": "SGD", "params": {"lr": 0.01}}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fp16, ZeRO-0, unfused": ("fp16", 0, SGD),
    "fp16, ZeRO-0, fused": ("fp16", 0, ADAM),
    "fp16, ZeRO-2": ("fp16", 2, ADAM),
    "bf16, ZeRO-0, unfused": ("bf16", 0, TORCH_ADAM),
    "bf16, ZeRO-0, fused": ("bf16", 0, ADAM),
    "bf16, ZeRO-1": ("bf16", 1, TORCH_ADAM),
    "bf16, ZeRO-3": ("bf16", 3, TORCH_ADAM),
}

# In a process of its own: DeepSpeed keeps state for a process.
RUN_CASES = """
import json, sys, traceback
from pathlib import Path
import torch
from torch import nn
from dwt_ds.quiet import quieten_libraries
quieten_libraries()
from deepspeed.accelerator import get_accelerator
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint import Retention, RunState, save_checkpoint
from dwt_ds.engine.resume import load_checkpoint
from dwt_ds.engine.student import gradient_norm, loss_scale, quieten_deepspeed, start_student, step_was_skipped
from dwt_ds.engine.weights import checkpoint_fp32_weights, full_fp32_weights
type(get_accelerator()).is_fp16_supported = lambda self: True  # slow on most CPUs, and enough for these
quieten_deepspeed()
ranks.start_ranks()

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.first = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, x):
        return self.tied(self.norm(self.first(x)) + self.frozen(x)).float().square().sum() * self.factor.float()

def run(precision, stage, optimizer, folder):
    torch.manual_seed(0)
    model = Model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
        "gradient_clipping": 0,
        "optimizer": optimizer, "zero_optimization": {"stage": stage}, precision: {"enabled": True},
    }
    if precision == "fp16":
        values["fp16"]["initial_scale_power"] = 8
    if stage == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = start_student(model, values)
    x = [torch.randn(2, 4).to(getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}[precision])) for _ in range(2)]

    def step(factor=1.0):
        for each in x:
            engine.backward(engine(each) * factor)
            engine.step()

    # The same step in fp32; the mean over micro-batches, as DeepSpeed has it.
    plain = Model()
    plain.load_state_dict({**plain.state_dict(), **start, "tied.weight": start["first.weight"]})
    (sum(plain(each.float()) for each in x) / 2).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    step()
    assert abs(gradient_norm(engine) / norm - 1) < 0.03, ("norm", gradient_norm(engine), norm)
    assert loss_scale(engine) == (256 if precision == "fp16" else None), loss_scale(engine)
    weights = full_fp32_weights(engine.module, keep=True)
    if optimizer["type"] == "SGD":
        for name, gradient in gradients.items():
            moved, meant = start[name].half().float() - weights[name], 0.01 * gradient
            assert (moved - meant).norm() < 0.03 * meant.norm(), (name, moved, meant)
    for _ in range(3):
        step()

    weights = full_fp32_weights(engine.module, keep=True)
    assert weights.keys() == {*start, "factor"}, weights.keys()
    lowered = lambda tensor: tensor.to(x[0].dtype).float()
    for name in start:
        assert weights[name].shape == start[name].shape, (name, weights[name].shape)
        rounded = torch.equal(weights[name], lowered(weights[name]))
        assert rounded == name.startswith("frozen"), name
    assert torch.equal(weights["frozen.weight"], lowered(start["frozen.weight"]))
    if stage == 0:
        wrapper = engine.optimizer
        held = getattr(wrapper, "fp32_groups_flat", None) or [p for group in wrapper.fp32_groups for p in group]
        masters = torch.cat([each.detach().flatten() for each in held])
        ours = torch.cat([weights[name].flatten() for name in gradients])
        assert torch.equal(ours, masters), "not the masters"

    save_checkpoint(engine, folder, RunState(step=4), {}, Retention(1, 0))
    saved = checkpoint_fp32_weights(folder / "step_00000004")
    assert saved.keys() == {*weights, "tied.weight"}, saved.keys()
    for name, tensor in {**weights, "tied.weight": weights["first.weight"]}.items():
        assert torch.equal(saved[name], tensor.float()), ("checkpoint", name)
    step(float("nan"))
    assert step_was_skipped(engine)
    unmoved = full_fp32_weights(engine.module, keep=True)
    assert all(torch.equal(unmoved[name], weights[name]) for name in weights), "skipped"
    if stage == 0:
        step()
        load_checkpoint(engine, folder / "step_00000004", 0)
        again = full_fp32_weights(engine.module, keep=True)
        assert all(torch.equal(again[name], weights[name]) for name in weights), "resumed"

for name, case in json.loads(sys.argv[1]).items():
    try:
        run(*case, Path(sys.argv[2]) / name.replace(" ", "_"))
        problem = ""
    except Exception:
        problem = traceback.format_exc()
    print(json.dumps([name, problem]), flush=True)
ranks.stop_ranks()
"""


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Case -> what was wrong."""
    folder = tmp_path_factory.mktemp("cases")
    done = subprocess.run(
        [sys.executable, "-c", RUN_CASES, json.dumps(CASES), str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **ON_CPU},
    )
    answers = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))
    assert answers.keys() == CASES.keys(), done.stderr
    return answers


@pytest.mark.parametrize("case", CASES)
def test_steps_norms_and_exports_are_those_of_the_masters(case: str, problems: dict[str, str]) -> None:
    assert not problems[case], problems[case]


# Ranks that read a converted checkpoint, one of them late. As with NCCL, a broadcast's source waits for nobody.
CONVERTED = """
import sys, time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
import torch.distributed as dist
from dwt_ds.engine import ranks, resume
ranks.start_ranks()
store, numbers = dist.distributed_c10d._get_default_store(), count()

def broadcast(values, src, device):
    key = f"broadcast {next(numbers)}"
    if ranks.rank() == src:
        store.set(key, "sent")
    store.get(key)

dist.broadcast_object_list = broadcast

def read(engine, universal):
    time.sleep(3 * ranks.rank())
    assert universal.is_dir(), f"rank {ranks.rank()}: deleted before it was read"

resume.read_manifest = lambda path: {"world_size": 3, "state": {}}
resume._convert = lambda path, universal: universal.mkdir()
resume._load = read
engine = SimpleNamespace(_config=SimpleNamespace(load_universal_checkpoint=False))
resume.load_checkpoint(engine, Path(sys.argv[1]) / "step_00000004", 0)
ranks.stop_ranks()
"""


def test_a_converted_checkpoint_stays_until_the_last_rank_has_read_it(tmp_path: Path, port: int) -> None:
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONVERTED, str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **ON_CPU, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    assert not list(tmp_path.iterdir())


class TestFusedAdam:
    """DeepSpeed compiles it at first use, for which a CUDA device needs nvcc."""

    @pytest.fixture(autouse=True)
    def _no_nvcc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []

        def why_not(name: str, device: torch.device) -> str:
            self.asked.append(name)
            return "MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)"

        monkeypatch.setattr(optimizers, "why_not", why_not)

    @pytest.mark.parametrize("name", ["AdamW", "Adam", "Muon"])
    def test_its_absence_is_told_before_the_folder_is_begun(self, name: str) -> None:
        with pytest.raises(ValueError, match="FusedAdam") as caught:
            check_optimizer({"optimizer": {"type": name, "params": {}}}, torch.device("cuda"), Origin("my.json"))
        assert self.asked == ["deepspeed.FusedAdam"]
        assert str(caught.value) == (
            f"my.json: optimizer.type={name!r}: DeepSpeed's FusedAdam is not usable here (MissingCUDAException: "
            "CUDA_HOME does not exist, unable to compile CUDA op(s)); install nvcc (the CUDA toolkit of torch's "
            f"version, {torch.version.cuda}), or set deepspeed.optimizer.params.torch_adam to true"
        )

    @pytest.mark.parametrize(
        ("values", "device"),
        [
            ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, "cuda"),
            (
                {
                    "optimizer": {"type": "AdamW"},
                    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                },
                "cuda",
            ),
            ({"optimizer": {"type": "AdamW"}}, "cpu"),
        ],
    )
    def test_it_is_not_asked_for_where_it_is_not_used(self, values: dict[str, Any], device: str) -> None:
        check_optimizer(values, torch.device(device), Origin("my.json"))
        assert not self.asked


def test_a_sharded_teacher_loads_without_the_other_ranks(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded: list[nn.Module] = []

    def shard(model: nn.Module, dtype: torch.dtype) -> nn.Module:
        sharded.append(model)
        return model

    monkeypatch.setattr(teacher, "shard_over_ranks", shard)
    settings: dict[str, Any] = {"dtype": "fp32", "kernel_inject": False, "device": torch.device("cpu"), "seq_len": 32}
    made = TeacherEngine(str(tiny_teacher), **settings, sharded=True)
    assert made.vocabulary_rows == 298
    assert not sharded, "it communicated"
    tokens = torch.arange(5, 21).reshape(1, 16)
    batch = SimpleNamespace(input_ids=tokens, attention_mask=None, positions=torch.arange(16))
    views = [made(batch) for _ in range(2)]  # type: ignore[arg-type]
    assert len(sharded) == 1
    assert torch.equal(views[0].hidden, views[1].hidden)


class TestRetention:
    @staticmethod
    def save(folder: Path, step: int, starts: list[int]) -> None:
        """A checkpoint of a run that was started at these steps."""
        path = folder / f"step_{step:08d}"
        path.mkdir(parents=True)
        (path / "weights.pt").write_bytes(b"x" * 10)
        state = {"step": step, "starts": [{"step": each, "at": f"start {i}"} for i, each in enumerate(starts)]}
        write_manifest(path, {"state": state, "files": file_facts(path, ["weights.pt"])})

    @staticmethod
    def kept(folder: Path, saved: int, **retention: int) -> list[int]:
        _delete_old(folder, saved, Retention(**{"keep_last": 1, "keep_every": 0, **retention}))
        return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())

    def test_damaged_newer_ones_do_not_push_out_the_good(self, tmp_path: Path) -> None:
        for step in (100, 200, 300):
            self.save(tmp_path, step, [0])
        for step in (200, 300):
            (tmp_path / f"step_{step:08d}" / "weights.pt").write_bytes(b"y" * 10)
        assert newest_good(tmp_path)[0] == tmp_path / "step_00000100"
        self.save(tmp_path, 150, [0, 100])
        assert self.kept(tmp_path, 150, keep_last=2) == [100, 150, 200, 300]
        assert newest_good(tmp_path)[0] == tmp_path / "step_00000150"
        self.save(tmp_path, 250, [0, 100])
        assert self.kept(tmp_path, 250, keep_last=2) == [150, 200, 250, 300], "200 is no good one"
        self.save(tmp_path, 350, [0, 100])
        assert self.kept(tmp_path, 350, keep_last=2) == [250, 300, 350]
        self.save(tmp_path, 450, [0, 100])
        assert self.kept(tmp_path, 450) == [450]

    def test_those_of_earlier_starts_count(self, tmp_path: Path) -> None:
        self.save(tmp_path, 100, [0])
        self.save(tmp_path, 200, [0])
        self.save(tmp_path, 300, [0, 200])
        self.save(tmp_path, 400, [0, 200, 300])
        assert self.kept(tmp_path, 400, keep_last=3) == [200, 300, 400]
        assert self.kept(tmp_path, 400, keep_last=1, keep_every=200) == [200, 400]

    def test_nothing_goes_where_the_newest_does_not_tell_its_past(self, tmp_path: Path) -> None:
        self.save(tmp_path, 100, [0])
        self.save(tmp_path, 200, [0])
        (tmp_path / "step_00000200" / "manifest.json").write_text("{")
        assert self.kept(tmp_path, 200) == [100, 200]


def test_a_rank_that_has_recorded_nothing_has_begun_nothing() -> None:
    assert collectives_begun('{"version": "2.10"}') == 0
    assert collectives_begun("") == 0
    assert collectives_begun('{"entries": [{"record_id": 0}, {"record_id": 4}]}') == 5
