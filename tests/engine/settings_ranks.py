"""A rank that resumes under other settings of the optimizer, and under the same, in each of the cases named.

python settings_ranks.py FOLDER CASE ...      prints a JSON list of case and problems; a case is such as `fp16 ZeRO-2`

Further words of a case: `offload` for an offloaded optimizer, `later` for one that is offloaded from the resume on,
`static` for a static loss scale, `re-sharded` for a checkpoint that is read as another number of ranks' would be.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from harness.rank_cases import try_cases, zero_of
from torch import nn

from dwt_ds.engine.checkpoint.manifest import RunFacts, RunState, newest_checkpoint
from dwt_ds.engine.checkpoint.save_and_load import Retention, load_checkpoint, save_checkpoint
from dwt_ds.engine.checkpoint.weights import full_fp32_weights
from dwt_ds.engine.student import gradient_norm, loss_scale, start_student, step_was_skipped

FACTS = RunFacts("data", "tokenizer", 4, 2, student={}, teacher=None, versions={}, settings={}, settings_sha256="")
BEFORE = {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
NOW = {"lr": 0.02, "betas": [0.5, 0.9], "eps": 1e-3, "weight_decay": 0.5}
DYNAMIC_BEFORE = {"initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1, "min_loss_scale": 1}
DYNAMIC_NOW = {"initial_scale_power": 9, "loss_scale_window": 7, "hysteresis": 3, "min_loss_scale": 4}


def start(case: str, params: dict[str, Any], clip: float, fp16: dict[str, Any]) -> Any:
    precision, stage, *further = case.split()
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": clip,
        "optimizer": {"type": "AdamW", "params": params},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": params["lr"], "warmup_num_steps": 1}},
        "zero_optimization": zero_of(stage, further),
    }
    if precision != "fp32":
        values[precision] = {"enabled": True, **(fp16 if precision == "fp16" else {})}
    return start_student(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), values)


def step(engine: Any) -> dict[str, torch.Tensor]:
    x = torch.linspace(-1, 1, 16).view(2, 8).to(next(engine.module.parameters()).dtype)
    engine.backward(engine(x).float().square().sum())
    engine.step()
    assert not step_was_skipped(engine)
    return full_fp32_weights(engine.module, keep=True)


def check_settings(engine: Any) -> None:
    """They are those of NOW."""
    for group in engine.basic_optimizer.param_groups:
        found = {key: list(value) if key == "betas" else value for key, value in group.items() if key in NOW}
        assert found == NOW, found
    assert getattr(engine.optimizer, "clip_grad", 0.125) == 0.125, engine.optimizer.clip_grad


def check_scale(engine: Any, scale: float) -> None:
    """The scale is that of the checkpoint, which had grown; what happens to it next is as DYNAMIC_NOW says."""
    assert loss_scale(engine) == scale, loss_scale(engine)
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None:
        scaler = engine.optimizer.loss_scale_config
        found = [scaler.scale_window, scaler.min_loss_scale]
        assert found == [7, 4], found
    else:
        found = [scaler.scale_window, scaler.min_scale, scaler.delayed_shift, scaler.raise_error_at_min_scale]
        assert found == [7, 4, 3, False], found
    assert scaler.cur_iter == 3, scaler.cur_iter


def run(case: str, folder: Path) -> None:
    dynamic = {} if "static" in case.split() else DYNAMIC_BEFORE
    engine = start(case, BEFORE, 1.0, dynamic or {"loss_scale": 8})
    for _ in range(3):
        step(engine)
    scale = loss_scale(engine)
    save_checkpoint(engine, folder, RunState(step=3), FACTS, Retention(1, 0))
    straight = step(engine)
    checkpoint = newest_checkpoint(folder)
    if "re-sharded" in case.split():
        checkpoint = checkpoint._replace(manifest={**checkpoint.manifest, "world_size": 2})

    engine = start(case, BEFORE, 1.0, dynamic or {"loss_scale": 8})
    load_checkpoint(engine, checkpoint, 0)
    again = step(engine)
    assert all(torch.equal(again[name], straight[name]) for name in straight), "another step with nothing changed"

    changed = start(case.replace("later", "offload"), NOW, 0.125, DYNAMIC_NOW if dynamic else {"loss_scale": 64})
    load_checkpoint(changed, checkpoint, 0)
    check_settings(changed)
    if case.startswith("fp16"):
        if dynamic:
            assert scale == 32, scale
            check_scale(changed, 32)
        else:
            assert loss_scale(changed) == 64, loss_scale(changed)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["latest", "step_00000003"], left
    moved = step(changed)
    assert abs(gradient_norm(changed) / gradient_norm(engine) - 1) < 0.01
    assert not all(torch.equal(moved[name], straight[name]) for name in straight)


if __name__ == "__main__":
    try_cases(sys.argv[2:], lambda case: run(case, Path(sys.argv[1]) / case))
