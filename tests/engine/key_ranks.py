"""Ranks that train a small model under each of the DeepSpeed settings named, and compare with plain AdamW.

python key_ranks.py CASES FOLDER     CASES: a JSON file of {name: DeepSpeed settings}; rank 0 prints a JSON list of name
                                     and problems for each
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness.key_cases import on_nvme
from harness.rank_cases import try_cases
from torch import Tensor, nn

from dwt_ds.base.trees import merge
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.manifest import RunFacts, RunState, newest_checkpoint
from dwt_ds.engine.checkpoint.save_and_load import Retention, load_checkpoint, save_checkpoint
from dwt_ds.engine.checkpoint.weights import checkpoint_fp32_weights, full_fp32_weights
from dwt_ds.engine.ds_json.combinations import precision
from dwt_ds.engine.student import gradient_divisor, gradient_norm, start_student, step_was_skipped
from dwt_ds.models.build import DTYPES

STEPS, MICRO_BATCHES, ROWS, CLIP, RATE, EPS, DECAY = 3, 2, 2, 1.0, 0.05, 0.05, 0.1
# A first step under fp16 may be skipped until the loss scale has fallen.
MOST_SKIPS = 20
FACTS = RunFacts("data", "tokenizer", 4, 2, student={}, teacher=None, versions={}, settings={}, settings_sha256="")


class Rows(NamedTuple):
    """A micro-batch, as little of a tensor as those of a run."""

    x: Tensor
    number: int


class Model(nn.Module):
    """Tied, frozen and unused parameters, and a buffer; the loss is a sum over the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.second = nn.Linear(8, 4)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, rows: Rows) -> Tensor:
        x = rows.x
        hidden = self.norm(self.first(x) + self.frozen(x))
        return (self.second(self.tied(hidden)).float() * self.factor.float() - x[:, :4].float()).square().sum()


def settings(case: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "train_batch_size": ROWS * MICRO_BATCHES * ranks.world_size(),
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "eps": EPS, "weight_decay": DECAY}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}},
    }
    zero = case.get("zero_optimization", {})
    if zero.get("stage") == 3 and "param_persistence_threshold" not in zero:
        base["zero_optimization"] = {"stage3_param_persistence_threshold": 0}
    if "fp16" in case:
        base["fp16"] = {"initial_scale_power": 8}
    return merge(base, case)


def batches(dtype: torch.dtype) -> list[list[Tensor]]:
    """By step, the micro-batches of all ranks, those of rank 0 first."""
    draw = torch.Generator().manual_seed(7)
    count = MICRO_BATCHES * ranks.world_size()
    # Rows of different sizes, so that a rank left out or counted twice shows.
    return [
        [(torch.randn(ROWS, 8, generator=draw) * (0.3 + number)).to(dtype) for number in range(count)]
        for _ in range(STEPS + 2)
    ]


class Plain:
    """AdamW on fp32 masters; the forward and backward pass on a copy in the lower precision."""

    def __init__(self, model: Model, dtype: torch.dtype, clip: float) -> None:
        self.masters, self._dtype, self._clip = copy.deepcopy(model).float(), dtype, clip
        trained = [p for p in self.masters.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=RATE, eps=EPS, weight_decay=DECAY)

    def step(self, micro_batches: list[Tensor]) -> float:
        """Returns the norm of the gradient before clipping."""
        rows = sum(len(x) for x in micro_batches)
        copied = copy.deepcopy(self.masters).to(self._dtype)
        for master in self.masters.parameters():
            master.grad = None
        for x in micro_batches:
            copied.zero_grad()
            (copied(Rows(x, len(x))) / rows).backward()
            for master, lower in zip(self.masters.parameters(), copied.parameters()):
                if lower.grad is not None:
                    master.grad = lower.grad.float() + (0.0 if master.grad is None else master.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.masters.parameters(), self._clip)
        self._optimizer.step()
        return float(norm)


def run(case: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    model = Model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = settings(case)
    if on_nvme(case):
        values["zero_optimization"]["offload_param"]["nvme_path"] = str(folder / "nvme")
    dtype = DTYPES[precision(values)]
    inexact = dtype != torch.float32 or "torch_autocast" in case or "communication_data_type" in case
    inexact = inexact or "grad_accum_dtype" in case.get("data_types", {})
    plain = Plain(model, dtype, values["gradient_clipping"])
    engine = start_student(model, values)
    divisor, world = gradient_divisor(engine), ranks.world_size()
    steps = batches(dtype)

    def step(micro_batches: list[Tensor], factor: float = 1.0) -> None:
        rows = sum(len(x) for x in micro_batches)
        first = ranks.rank() * MICRO_BATCHES
        for x in micro_batches[first : first + MICRO_BATCHES]:
            engine.backward(engine(Rows(x, len(x))) * (factor if ranks.rank() == world - 1 else 1.0) * divisor / rows)
            engine.step()

    for number in range(STEPS):
        step(steps[number])
        for _ in range(MOST_SKIPS if values.get("torch_autocast", {}).get("dtype") == "fp16" else 0):
            if step_was_skipped(engine):
                step(steps[number])
        expected = plain.step(steps[number])
        found = gradient_norm(engine)
        assert not step_was_skipped(engine), f"step {number} was skipped"
        assert abs(found / expected - 1) < (0.05 if inexact else 1e-4), f"step {number}: norm {found}, plain {expected}"
    weights = full_fp32_weights(engine.module, keep=True)
    same_as_plain(weights, dict(plain.masters.named_parameters()), start, inexact)

    save_checkpoint(engine, folder, RunState(step=STEPS), FACTS, Retention(1, 0))
    path = folder / f"step_{STEPS:08d}"
    saved = checkpoint_fp32_weights(path)
    differ = [name for name, tensor in weights.items() if not torch.equal(saved[name].float(), tensor.float())]
    assert not differ, f"not the run's in the checkpoint: {differ}"
    step(steps[STEPS])
    once = full_fp32_weights(engine.module, keep=True)
    load_checkpoint(engine, newest_checkpoint(folder), 0)
    step(steps[STEPS])
    again = full_fp32_weights(engine.module, keep=True)
    differ = [name for name in once if not torch.equal(once[name], again[name])]
    assert not differ, f"another step after loading the checkpoint: {differ}"
    step(steps[STEPS + 1], float("nan"))
    assert step_was_skipped(engine), "a NaN on one rank was taken"
    after = full_fp32_weights(engine.module, keep=True)
    assert all(torch.equal(after[name], again[name]) for name in again), "the weights moved on a skipped step"


def same_as_plain(
    found: dict[str, Tensor], expected: dict[str, nn.Parameter], start: dict[str, Tensor], inexact: bool
) -> None:
    for name, parameter in expected.items():
        assert name in found, f"{name} is missing"
        far = (found[name] - parameter).norm().item()
        moved = (parameter - start[name]).norm().item()
        allowed = 0.1 * moved + 1e-2 * start[name].norm().item() * (moved == 0) if inexact else 1e-5
        assert far <= allowed, f"{name}: {far:.3g} from plain AdamW's, which moved it by {moved:.3g}"


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    folders = {name: Path(sys.argv[2]) / str(number) for number, name in enumerate(cases)}
    try_cases(cases, lambda name: run(cases[name], folders[name]))
