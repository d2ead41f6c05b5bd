"""Numbers that a JSON or an override writes as text or with an exponent: numbers, or one line before the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.ds_values import nested

from dwt_ds.base.trees import get_place
from dwt_ds.engine.ds_json.load import load_ds_json

TYPES = {"optimizer.type": "AdamW", "scheduler.type": "WarmupDecayLR"}


def read(tmp_path: Path, written: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    path = tmp_path / "my.json"
    path.write_text(json.dumps(nested(TYPES | written)), encoding="utf-8")
    return load_ds_json(str(path), overrides).values


@pytest.mark.parametrize(
    ("place", "text", "number"),
    [
        ("optimizer.params.eps", "1e-8", 1e-8),
        ("optimizer.params.lr", "5.0e-4", 5e-4),
        ("optimizer.params.betas", ["0.9", 0.95], [0.9, 0.95]),
        ("optimizer.params.weight_decay", "0", 0),
        ("scheduler.params.warmup_max_lr", "1.0e-3", 1e-3),
        ("scheduler.params.warmup_num_steps", "1e2", 100),
        ("scheduler.params.warmup_num_steps", 100.0, 100),
        ("gradient_clipping", "1.0", 1.0),
        ("train_micro_batch_size_per_gpu", 8.0, 8),
        ("train_micro_batch_size_per_gpu", "8", 8),
        ("zero_optimization.reduce_bucket_size", "2.5e8", 250_000_000),
        ("zero_optimization.reduce_bucket_size", 2.5e8, 250_000_000),
        ("zero_optimization.offload_optimizer.buffer_count", "4", 4),
        ("zero_optimization.offload_optimizer.ratio", "0.5", 0.5),
        ("fp16.initial_scale_power", "12", 12),
        ("flops_profiler.profile_step", "5", 5),
        ("aio.block_size", "1e6", 1_000_000),
        ("activation_checkpointing.number_checkpoints", "4", 4),
    ],
)
def test_text_is_the_number_that_it_writes(
    place: str, text: Any, number: Any, tmp_path: Path, recipe: Callable[..., Any]
) -> None:
    found = get_place(read(tmp_path, {place: text}, {}), place)
    assert found == number
    assert type(found) is type(number)
    yaml = json.dumps(text) if isinstance(text, list) else f"'{text}'" if isinstance(text, str) else text
    overrides = recipe(f"deepspeed.{place}={yaml}").config.deepspeed
    found = get_place(read(tmp_path, {}, overrides), place)
    assert found == number
    assert type(found) is type(number)


@pytest.mark.parametrize(
    ("place", "value", "must_be"),
    [
        ("optimizer.params.eps", "small", "a number"),
        ("optimizer.params.lr", True, "a number"),
        ("optimizer.params.betas", ["high", 0.9], "a number"),
        ("optimizer.params.amsgrad", "yes", "true or false"),
        ("optimizer.params.torch_adam", 1, "true or false"),
        ("scheduler.params.warmup_num_steps", 2.5, "a whole number"),
        ("scheduler.params.warmup_num_steps", 0, "at least 1"),
        ("gradient_clipping", "much", "a number"),
        ("gradient_accumulation_steps", "1.5", "a whole number"),
        ("gradient_accumulation_steps", [1], "a whole number"),
        ("zero_optimization.reduce_bucket_size", "2.5", "a whole number"),
        ("flops_profiler.profile_step", "late", "a whole number"),
        ("aio.single_submit", "yes", "true or false"),
        ("activation_checkpointing.number_checkpoints", "few", "a whole number"),
        ("activation_checkpointing.cpu_checkpointing", 1, "true or false"),
    ],
)
def test_what_is_no_number_is_reported(place: str, value: Any, must_be: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^my.json: {place}=.*: must be {must_be}$"):
        read(tmp_path, {place: value}, {})
