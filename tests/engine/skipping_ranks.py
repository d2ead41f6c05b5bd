"""Ranks that take a step, have a NaN on the last rank, and take another step, under each of the settings named.

With "growing" in its name, a case takes steps of fp16 whose loss scale grows.

python skipping_ranks.py CASE ...      rank 0 prints a JSON list of case and problems
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from harness.rank_cases import try_cases, zero_of
from torch import nn

from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.weights import full_fp32_weights
from dwt_ds.engine.student import gradient_norm, loss_scale, start_student, step_was_skipped


def settings(case: str) -> dict[str, Any]:
    """DeepSpeed's, of a case such as `bf16 ZeRO-2 offload`."""
    precision, stage, *further = case.split()
    return {
        "train_batch_size": 4 * ranks.world_size(),
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.01,  # every step is clipped
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.02}},
        "zero_optimization": zero_of(stage, further),
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }


def apply_whole_gradients(case: str) -> None:
    """While the loss scale doubles in every other step, each step applies the gradient whose norm is shown.

    So a step of SGD moves the weights by that norm, times the learning rate.
    """
    values = settings(case) | {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    values["fp16"] |= {"initial_scale_power": 4, "loss_scale_window": 2}
    values["optimizer"] = {"type": "SGD", "params": {"lr": 0.01}}
    values["scheduler"]["params"]["warmup_max_lr"] = 0.01
    torch.manual_seed(0)
    compiles = "compiled" in case.split()
    engine = start_student(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), values, compiles=compiles)
    x = torch.randn(2, 8, dtype=torch.float16)
    scales = []
    before = full_fp32_weights(engine.module, keep=True)
    for _ in range(6):
        scales.append(loss_scale(engine))
        for _ in range(2):
            engine.backward(engine(x).float().square().mean())
            engine.step()
        after = full_fp32_weights(engine.module, keep=True)
        moved = torch.stack([(after[name] - before[name]).norm() for name in before]).norm()
        torch.testing.assert_close(moved.item(), 0.01 * gradient_norm(engine), rtol=1e-3, atol=0)
        before = after
    assert scales[-1] == 4 * scales[0], scales


def run(case: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    compiles = "compiled" in case.split()
    engine = start_student(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), settings(case), compiles=compiles)
    x = torch.randn(2, 8, dtype=next(engine.module.parameters()).dtype)

    def step(factor: float = 1.0) -> dict[str, torch.Tensor]:
        for micro_batch in range(2):
            # As the run's guard does it: in one micro-batch of one rank.
            bad = micro_batch == 0 and ranks.rank() == ranks.world_size() - 1
            engine.backward(engine(x).float().square().mean() * (factor if bad else 1.0))
            engine.step()
        return full_fp32_weights(engine.module, keep=True)

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    first, rate = step(), engine.get_lr()[0]
    assert not step_was_skipped(engine)
    after = step(float("nan"))
    assert step_was_skipped(engine), "the step was taken"
    assert same(after, first), "the weights moved"
    assert engine.get_lr()[0] == rate, "the learning rate moved"
    assert engine.skipped_steps == 1, engine.skipped_steps
    third = step()
    assert not step_was_skipped(engine), "the next step was skipped as well"
    assert not same(third, first), "the next step did not move the weights"
    assert all(tensor.isfinite().all() for tensor in third.values())
    assert gradient_norm(engine) > 0, gradient_norm(engine)
    assert engine.get_lr()[0] != rate
    if compiles:
        assert same(third, run(case.removesuffix(" compiled"))), "to compile what is done to gradients changes them"
    return third


if __name__ == "__main__":
    try_cases(sys.argv[1:], lambda case: apply_whole_gradients(case) if "growing" in case.split() else run(case))
