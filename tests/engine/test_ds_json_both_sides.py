"""Values that both the recipe and the DeepSpeed JSON may set: equal, or an error that names both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness.errors import error_of

from dwt_ds.config.schema import RunConfig
from dwt_ds.engine.ds_json.resolve import resolved_recipe

Resolve = Callable[..., tuple[RunConfig, dict[str, Any]]]


@pytest.mark.parametrize(
    ("ds", "override", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train.micro_batch_size=8",
            "train.micro_batch_size=8 (recipe) and train_micro_batch_size_per_gpu=4 (my.json) differ",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "train.gradient_accumulation_steps=1",
            "train.gradient_accumulation_steps=1 (recipe) and gradient_accumulation_steps=2 (my.json) differ",
        ),
        (
            {"gradient_clipping": 0.5},
            "train.max_grad_norm=1.0",
            "train.max_grad_norm=1.0 (recipe) and gradient_clipping=0.5 (my.json) differ",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}},
            "train.learning_rate=5e-4",
            "train.learning_rate=0.0005 (recipe) and optimizer.params.lr=0.0003 (my.json) differ",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}},
            "train.betas=[0.9, 0.999]",
            "train.betas=[0.9, 0.999] (recipe) and optimizer.params.betas=[0.9, 0.95] (my.json) differ",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}},
            "train.weight_decay=0",
            "train.weight_decay=0.0 (recipe) and optimizer.params.weight_decay=0.1 (my.json) differ",
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1000, "warmup_num_steps": 5}}},
            "train.max_steps=100",
            "train.max_steps gives 100 (recipe) and scheduler.params.total_num_steps=1000 (my.json) differ",
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1000, "warmup_num_steps": 5}}},
            "train.epochs=2",
            "train.epochs gives 100 (recipe) and scheduler.params.total_num_steps=1000 (my.json) differ",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 50}}},
            "train.warmup_ratio=0.1",
            "train.warmup_ratio gives 10 (recipe) and scheduler.params.warmup_num_steps=50 (my.json) differ",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}},
            "train.learning_rate=5e-4",
            "train.learning_rate gives 0.0005 (recipe) and scheduler.params.warmup_max_lr=0.001 (my.json) differ",
        ),
    ],
)
def test_a_value_set_on_both_sides_and_differently_names_both(
    ds: dict[str, Any], override: str, message: str, resolve: Resolve
) -> None:
    expected = f'{message}; set the one in the JSON to "auto" or make them equal'
    assert error_of(resolve, ds, override) == expected


@pytest.mark.parametrize(
    ("ds", "override"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "train.micro_batch_size=8"),
        ({"gradient_clipping": 1}, "train.max_grad_norm=1.0"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.0005}}}, "train.learning_rate=5e-4"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, "train.betas=[0.9, 0.999]"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, "train.warmup_ratio=0.1"),
        # The rate that the ramp starts from is the JSON's business alone.
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0}}}, "train.learning_rate=5e-4"),
    ],
)
def test_a_value_set_on_both_sides_alike_is_fine(ds: dict[str, Any], override: str, resolve: Resolve) -> None:
    resolve(ds, override)


def with_rates(schedule: str, optimizer: dict[str, Any], **peaks: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "scheduler": {"type": schedule, "params": peaks}}


@pytest.mark.parametrize(
    ("ds", "names"),
    [
        (
            with_rates("WarmupLR", {"type": "AdamW", "params": {"lr": 1e-3}}, warmup_max_lr=2e-3),
            "optimizer.params.lr=0.001 (my.json) and scheduler.params.warmup_max_lr=0.002 (my.json)",
        ),
        (
            with_rates("WarmupDecayLR", {"type": "AdamW", "params": {"lr": 1e-3}}, warmup_max_lr=[2e-3]),
            "optimizer.params.lr=0.001 (my.json) and scheduler.params.warmup_max_lr=[0.002] (my.json)",
        ),
        (
            with_rates("OneCycle", {"type": "AdamW", "params": {"lr": 1e-3}}, cycle_min_lr=1e-4, cycle_max_lr=2e-3),
            "optimizer.params.lr=0.001 (my.json) and scheduler.params.cycle_max_lr=0.002 (my.json)",
        ),
        (
            with_rates("WarmupLR", {"type": "Muon", "params": {"lr": 1e-3, "muon_lr": 0.02}}),
            "optimizer.params.muon_lr=0.02 (my.json) and scheduler.params.warmup_max_lr=0.001 (my.json)",
        ),
    ],
)
def test_a_rate_that_the_schedule_would_replace_is_reported(ds: dict[str, Any], names: str, resolve: Resolve) -> None:
    assert error_of(resolve, ds) == (
        f"{names} differ, and the schedule would replace the first; make them equal, set one of them to "
        '"auto", or use WarmupCosineLR or WarmupStableDecayLR, which scale the optimizer\'s'
    )


@pytest.mark.parametrize("lr", [{}, {"lr": "auto"}, {"lr": 2e-3}])
@pytest.mark.parametrize(
    ("schedule", "peaks"),
    [
        ("WarmupLR", {"warmup_max_lr": 2e-3}),
        ("WarmupDecayLR", {"warmup_max_lr": [2e-3]}),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 2e-3}),
    ],
)
def test_the_rate_that_trains_is_the_one_recorded(
    lr: dict[str, Any], schedule: str, peaks: dict[str, Any], resolve: Resolve
) -> None:
    config, values = resolve(with_rates(schedule, {"type": "AdamW", "params": lr}, **peaks))
    assert config.train.learning_rate == values["optimizer"]["params"]["lr"] == 2e-3
    assert resolved_recipe(config, values, 100)["train"]["learning_rate"] == 2e-3


def test_a_written_warm_up_holds_where_the_json_has_none(resolve: Resolve) -> None:
    _, values = resolve({"scheduler": {"type": "WarmupLR"}}, "train.warmup_ratio=0.1")
    assert values["scheduler"]["params"]["warmup_num_steps"] == 10


def test_values_that_only_the_json_has_reach_the_settings_of_the_run(resolve: Resolve) -> None:
    params = {"lr": 3e-4, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.02}
    ds = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.25,
        "optimizer": {"type": "AdamW", "params": params},
    }
    config, values = resolve(ds)
    train = config.train
    assert (train.micro_batch_size, train.gradient_accumulation_steps, train.max_grad_norm) == (2, 5, 0.25)
    assert (train.learning_rate, train.betas, train.eps, train.weight_decay) == (3e-4, (0.8, 0.9), 1e-6, 0.02)
    assert values["train_batch_size"] == 20
    # The schedule the recipe brings follows the rate of the JSON.
    assert values["scheduler"]["params"]["warmup_max_lr"] == 3e-4


@pytest.mark.parametrize(
    ("ds", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 0}, "my.json: train_micro_batch_size_per_gpu=0: must be above 0"),
        (
            {"train_micro_batch_size_per_gpu": 0, "train_batch_size": 8},
            "train_batch_size=8 (my.json) does not divide by micro-batch 16 x 2 ranks; choose a multiple of 32",
        ),
        ({"gradient_clipping": -1}, "my.json: gradient_clipping=-1: must be at least 0"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}},
            "my.json: optimizer.params.lr='fast': must be a number",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}},
            "my.json: optimizer.params.betas=[0.9]: must be a longer list",
        ),
    ],
)
def test_values_of_the_json_are_held_to_the_recipes_rules(ds: dict[str, Any], message: str, resolve: Resolve) -> None:
    assert error_of(resolve, ds) == message
