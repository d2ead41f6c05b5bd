"""The fp32 masters of 16-bit weights under every ZeRO stage: steps, logged norms, exports, checkpoints, skips.

Frozen parameters are among them.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness.ranks import Run

from dwt_ds.engine.gradients import _clip_factor

ADAM = {"type": "AdamW", "params": {"lr": 0.01}}
TORCH_ADAM = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
SGD = {"type": "SGD", "params": {"lr": 0.01}}
# Case -> precision, ZeRO stage, optimizer. DeepSpeed's wrapper without ZeRO is the unfused one, if not ", fused".
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fp16, ZeRO-0, unfused": ("fp16", 0, SGD),
    "fp16, ZeRO-0, fused": ("fp16", 0, ADAM),
    "fp16, ZeRO-2": ("fp16", 2, ADAM),
    "bf16, ZeRO-0, unfused": ("bf16", 0, TORCH_ADAM),
    "bf16, ZeRO-0, fused": ("bf16", 0, ADAM),
    "bf16, ZeRO-1": ("bf16", 1, TORCH_ADAM),
    "bf16, ZeRO-3": ("bf16", 3, TORCH_ADAM),
}
if find_spec("pytorch_optimizer"):
    CASES["bf16, ZeRO-0, LAMB"] = ("bf16", 0, {"type": "Lamb", "params": {"lr": 0.01}})
MUON = {"fp16, ZeRO-0, Muon": ("fp16", 0, {"type": "Muon", "params": {"lr": 0.01}})}


# In a process of its own: DeepSpeed keeps state for a process.
RUN_CASES = """
import json, sys, traceback
from pathlib import Path
import torch
from torch import nn
from dwt_ds.base.quiet import quieten_libraries
quieten_libraries()
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import engine as ds_engine
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.manifest import RunFacts, RunState, newest_checkpoint
from dwt_ds.engine.checkpoint.save_and_load import Retention, load_checkpoint, save_checkpoint
from dwt_ds.engine.student import gradient_norm, loss_scale, quieten_deepspeed, start_student, step_was_skipped
from dwt_ds.engine.checkpoint.weights import checkpoint_fp32_weights, full_fp32_weights
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
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}},
    }
    if precision == "fp16":
        values["fp16"]["initial_scale_power"] = 8
    if stage == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = start_student(model, values)
    assert (type(engine.optimizer).__name__ == "FP16_Optimizer") == (ds_engine.FusedAdam is torch.optim.AdamW)
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

    nothing = {"student": {}, "teacher": None, "versions": {}, "settings": {}}
    facts = RunFacts("data", "tokenizer", vocab_size=4, seq_len=2, settings_sha256="", **nothing)
    save_checkpoint(engine, folder, RunState(step=4), facts, Retention(1, 0))
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
        load_checkpoint(engine, newest_checkpoint(folder), 0)
        again = full_fp32_weights(engine.module, keep=True)
        assert all(torch.equal(again[name], weights[name]) for name in weights), "resumed"

fused = ds_engine.FusedAdam
for name, case in json.loads(sys.argv[1]).items():
    # With nvcc, DeepSpeed's Adam is a fused one, and has another wrapper.
    ds_engine.FusedAdam = torch.optim.AdamW if name.endswith(", fused") else fused
    try:
        run(*case, Path(sys.argv[2]) / name.replace(" ", "_"))
        problem = ""
    except Exception:
        problem = traceback.format_exc()
    print(json.dumps([name, problem]), flush=True)
ranks.stop_ranks()
"""


def problems_of(cases: dict[str, Any], run_ranks: Run, folder: Path) -> dict[str, str]:
    """Case -> what was wrong."""
    [done] = run_ranks([["-c", RUN_CASES, json.dumps(cases), str(folder)]], seconds=600)
    answers = dict(json.loads(line) for line in done.out.splitlines() if line.startswith('["'))
    assert answers.keys() == cases.keys(), done.err
    return answers


def test_gradients_are_clipped_only_above_the_limit() -> None:
    optimizer = SimpleNamespace(loss_scale=8.0, clip_grad=2.0)
    assert [_clip_factor(optimizer, norm) for norm in (8.0, 32.0)] == pytest.approx([1 / 8, 1 / 16])


@pytest.fixture(scope="module")
def problems(run_ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return problems_of(CASES, run_ranks, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("case", CASES)
def test_steps_norms_and_exports_are_those_of_the_masters(case: str, problems: dict[str, str]) -> None:
    assert not problems[case], problems[case]


@pytest.mark.slow
@pytest.mark.timeout(900)  # DeepSpeed compiles the Adam inside its Muon
def test_muons_too(run_ranks: Run, tmp_path: Path) -> None:
    assert problems_of(MUON, run_ranks, tmp_path) == dict.fromkeys(MUON, "")
