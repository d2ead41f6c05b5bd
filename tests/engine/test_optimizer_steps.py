"""Optimizers take real steps: under DeepSpeed, with the real apex, and a resumed Adam to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness.launcher import Launch
from harness.runs import completed
from torch import nn

from dwt_ds.base.ports import reserve_port
from dwt_ds.engine.optimizers import (
    client_optimizer,
    replay_adam_steps,
    unusable_reason,
)

CPU = torch.device("cpu")
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}

# Runs in a process of its own: DeepSpeed keeps state for a process, and the ranks' environment must not stay behind.
STEPS = """
import json, sys
import torch
from torch import nn
from dwt_ds.base.quiet import quieten_libraries
quieten_libraries()
from dwt_ds.engine import ranks
from dwt_ds.engine.student import quieten_deepspeed, start_student
quieten_deepspeed()
ranks.start_ranks()
for name, optimizer, zero in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    values = {
        "train_batch_size": 2, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0,
        "optimizer": optimizer, "zero_optimization": zero,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}},
    }
    engine = start_student(model, values)
    losses = []
    for _ in range(3):
        loss = engine(torch.ones(2, 8, device=ranks.device())).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    print(json.dumps([name, type(engine.basic_optimizer).__name__, losses]), flush=True)
"""

# Case -> optimizer section, ZeRO section, the class that DeepSpeed takes on a CPU.
ON_A_CPU: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "Adam": ({"type": "Adam", "params": {"lr": 0.01, "adam_w_mode": False}}, {"stage": 2}, "Adam"),
    "AdamW": ({"type": "AdamW", "params": {"lr": 0.01}}, {"stage": 1}, "AdamW"),
    "AdamW offloaded": ({"type": "AdamW", "params": {"lr": 0.01}}, OFFLOAD, "DeepSpeedCPUAdam"),
    "Adagrad": ({"type": "Adagrad", "params": {"lr": 0.01}}, {"stage": 0}, "Adagrad"),
    "Muon": ({"type": "Muon", "params": {"lr": 0.01}}, {"stage": 2}, "MuonWithAuxAdam"),
    "torch's AdamW": ({"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}, {"stage": 2}, "AdamW"),
    "Lamb": ({"type": "Lamb", "params": {"lr": 0.01}}, {"stage": 0}, "Lamb"),
}

# Those that have CUDA kernels of DeepSpeed's own.
ON_A_GPU: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "AdamW": ({"type": "AdamW", "params": {"lr": 0.01}}, {"stage": 2}, "FusedAdam"),
    "AdamW offloaded": ({"type": "AdamW", "params": {"lr": 0.01}}, OFFLOAD, "DeepSpeedCPUAdam"),
    "Lion": ({"type": "Lion", "params": {"lr": 0.01}}, {"stage": 2}, "FusedLion"),
    "Muon": ({"type": "Muon", "params": {"lr": 0.01}}, {"stage": 2}, "MuonWithAuxAdam"),
    "Lamb": ({"type": "Lamb", "params": {"lr": 0.01}}, {"stage": 0}, "FusedLamb"),
}


def run_steps(
    cases: dict[str, tuple[dict[str, Any], dict[str, Any], str]], *, on_gpu: bool = False, timeout_seconds: float = 800
) -> dict[str, tuple[str, list[float]]]:
    device = {"CUDA_VISIBLE_DEVICES": "0"} if on_gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    settings = {**device, "OMP_NUM_THREADS": "1", "RANK": "0"}
    settings |= {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    asked = json.dumps([[name, optimizer, zero] for name, (optimizer, zero, _) in cases.items()])
    done = subprocess.run(
        [sys.executable, "-c", STEPS, asked],
        env={**os.environ, **settings, "MASTER_PORT": str(reserve_port())},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    return {name: (kind, losses) for name, kind, losses in rows}


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first use of an optimizer compiles it
def test_deepspeeds_optimizers_learn_on_a_cpu() -> None:
    cases = dict(ON_A_CPU)
    if unusable_reason("pytorch_optimizer.Lamb", CPU):
        del cases["Lamb"]
    done = run_steps(cases)
    assert {name: kind for name, (kind, _) in done.items()} == {name: kind for name, (_, _, kind) in cases.items()}
    for name, (_, losses) in done.items():
        assert losses[2] < losses[1] < losses[0], name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.slow
@pytest.mark.timeout(900)  # as above
def test_deepspeeds_optimizers_learn_on_a_gpu() -> None:
    done = run_steps(ON_A_GPU, on_gpu=True)
    assert {name: kind for name, (kind, _) in done.items()} == {name: kind for name, (_, _, kind) in ON_A_GPU.items()}
    for name, (_, losses) in done.items():
        assert losses[2] < losses[1] < losses[0], name


@pytest.mark.slow
@pytest.mark.timeout(1800)  # both are compiled at their first use
def test_lion_and_adagrad_learn_offloaded() -> None:
    section = {"params": {"lr": 0.01}}
    done = run_steps(
        {
            "Lion": ({"type": "Lion", **section}, OFFLOAD, ""),
            "Adagrad": ({"type": "Adagrad", **section}, OFFLOAD, ""),
        },
        timeout_seconds=1700,
    )
    assert [kind for kind, _ in done.values()] == ["DeepSpeedCPULion", "DeepSpeedCPUAdagrad"]
    for name, (_, losses) in done.items():
        assert losses[2] < losses[0], name


@pytest.mark.slow  # it is compiled at its first use
@pytest.mark.parametrize("name", ["DeepSpeedCPUAdam", "FusedAdam"])
@pytest.mark.parametrize("within_muon", [False, True])
def test_a_resumed_adam_of_a_cpu_repeats_its_steps_to_the_last_bit(name: str, within_muon: bool) -> None:
    """31 steps, and 26 of them again by an optimizer that loaded the state of step 5."""
    from deepspeed.ops import adam
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    generator = torch.Generator().manual_seed(3)
    start = torch.randn(64, generator=generator)
    gradients = torch.randn(31, 64, generator=generator)

    def make(values: torch.Tensor) -> torch.optim.Optimizer:
        parameters, settings = [nn.Parameter(values.clone())], {"lr": 0.01, "weight_decay": 0.01}
        if within_muon:
            groups = [{"params": parameters, "use_muon": False, **settings}]
            return MuonWithAuxAdam(groups, getattr(adam, name), settings)
        return getattr(adam, name)(parameters, **settings)

    def walk(optimizer: torch.optim.Optimizer, steps: range) -> torch.Tensor:
        parameter = optimizer.param_groups[0]["params"][0]
        for step in steps:
            parameter.grad = gradients[step].clone()
            optimizer.step()
        return parameter.detach().clone()

    first = make(start)
    middle = walk(first, range(5))
    saved = first.state_dict()
    saved["state"] = {
        key: {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        for key, state in saved["state"].items()
    }
    straight = walk(first, range(5, 31))

    walk(make(start), range(3))  # whatever else went through the same C++ object
    resumed = make(middle)
    resumed.load_state_dict(saved)
    replay_adam_steps(resumed)
    assert torch.equal(walk(resumed, range(5, 31)), straight)


needs_apex = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(unusable_reason("apex.FusedAdam", torch.device("cuda"))),
    reason="needs NVIDIA's apex with its CUDA extensions, and a GPU",
)


@needs_apex
@pytest.mark.parametrize("name", ["apex.FusedAdam", "apex.FusedLAMB"])
def test_the_real_apex_takes_a_step_like_the_reference(name: str) -> None:
    gpu = torch.device("cuda")
    start = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = (nn.Parameter(start.clone().to(gpu)) for _ in range(2))
    params = {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.0}
    make = client_optimizer({"optimizer": {"type": name, "params": params}}, gpu)
    assert make is not None
    optimizer, reference = make([ours]), torch.optim.AdamW([theirs], lr=0.01, eps=1e-6, weight_decay=0.0)
    for parameter in (ours, theirs):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    reference.step()
    if name == "apex.FusedAdam":
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    else:
        assert torch.isfinite(ours).all()
        assert (ours < start.to(gpu)).all()


@needs_apex
def test_the_real_apex_trains_under_zero_2(launch: Launch, tiny_recipe: Path, tmp_path: Path) -> None:
    on_gpu = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"}
    settings = [f"output_dir={tmp_path}", "deepspeed.optimizer.type=apex.FusedAdam"]
    completed(launch(1, [str(tiny_recipe), *settings], environment=on_gpu, timeout_seconds=300))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["deepspeed"]["optimizer"]["type"] == "apex.FusedAdam"
