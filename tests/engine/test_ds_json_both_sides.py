"""Values that both the recipe and the DeepSpeed JSON may set: equal, or an error that names both."""

from __future__ import annotations

from typing import Any

import pytest
from harness.ds_values import Resolve
from harness.errors import error_of

from dwt_ds.base.trees import set_place
from dwt_ds.engine.ds_json.resolve import resolved_recipe

REPLACED = (
    "differ, and the schedule would replace the first; make them equal, set one of them to "
    '"auto", or use WarmupCosineLR or WarmupStableDecayLR, which scale the optimizer\'s'
)


@pytest.mark.parametrize(
    ("place", "value", "override", "in_the_recipe"),
    [
        ("train_micro_batch_size_per_gpu", 4, "train.micro_batch_size=8", "train.micro_batch_size=8"),
        (
            "gradient_accumulation_steps",
            2,
            "train.gradient_accumulation_steps=1",
            "train.gradient_accumulation_steps=1",
        ),
        ("gradient_clipping", 0.5, "train.max_grad_norm=1.0", "train.max_grad_norm=1.0"),
        ("optimizer.params.lr", 3e-4, "train.learning_rate=5e-4", "train.learning_rate=0.0005"),
        ("optimizer.params.betas", [0.9, 0.95], "train.betas=[0.9, 0.999]", "train.betas=[0.9, 0.999]"),
        ("optimizer.params.weight_decay", 0.1, "train.weight_decay=0", "train.weight_decay=0.0"),
        ("scheduler.params.total_num_steps", 1000, "train.max_steps=100", "train.max_steps gives 100"),
        ("scheduler.params.total_num_steps", 1000, "train.epochs=2", "train.epochs gives 100"),
        ("scheduler.params.warmup_num_steps", 50, "train.warmup_ratio=0.1", "train.warmup_ratio gives 10"),
        ("scheduler.params.warmup_max_lr", 1e-3, "train.learning_rate=5e-4", "train.learning_rate gives 0.0005"),
    ],
)
def test_a_value_set_on_both_sides_and_differently_names_both(
    place: str, value: Any, override: str, in_the_recipe: str, resolve: Resolve
) -> None:
    assert error_of(resolve, with_value(place, value), override) == (
        f"{in_the_recipe} (recipe) and {place}={value} (my.json) differ; "
        'set the one in the JSON to "auto" or make them equal'
    )


@pytest.mark.parametrize(
    ("place", "value", "override"),
    [
        ("train_micro_batch_size_per_gpu", 8, "train.micro_batch_size=8"),
        ("gradient_clipping", 1, "train.max_grad_norm=1.0"),
        ("optimizer.params.lr", 0.0005, "train.learning_rate=5e-4"),
        ("optimizer.params.betas", [0.9, 0.999], "train.betas=[0.9, 0.999]"),
        ("scheduler.params.warmup_num_steps", 10, "train.warmup_ratio=0.1"),
        # The rate that the ramp starts from is the JSON's business alone.
        ("scheduler.params.warmup_min_lr", 0.0, "train.learning_rate=5e-4"),
    ],
)
def test_a_value_set_on_both_sides_alike_is_fine(place: str, value: Any, override: str, resolve: Resolve) -> None:
    resolve(with_value(place, value), override)


def with_value(place: str, value: Any) -> dict[str, Any]:
    """A JSON with a value at a dotted place, and what must stand beside it."""
    ds: dict[str, Any] = {}
    if place.startswith("optimizer."):
        ds = {"optimizer": {"type": "AdamW"}}
    elif place.startswith("scheduler."):
        ds = {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 5}}}
    set_place(ds, place, value)
    return ds


def with_rates(schedule: str, optimizer: dict[str, Any], **peaks: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "scheduler": {"type": schedule, "params": peaks}}


@pytest.mark.parametrize(
    ("schedule", "peaks", "peak"),
    [
        ("WarmupLR", {"warmup_max_lr": 2e-3}, "warmup_max_lr=0.002"),
        ("WarmupDecayLR", {"warmup_max_lr": [2e-3]}, "warmup_max_lr=[0.002]"),
        ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 2e-3}, "cycle_max_lr=0.002"),
    ],
)
def test_a_rate_that_the_schedule_would_replace_is_reported(
    schedule: str, peaks: dict[str, Any], peak: str, resolve: Resolve
) -> None:
    ds = with_rates(schedule, {"type": "AdamW", "params": {"lr": 1e-3}}, **peaks)
    names = f"optimizer.params.lr=0.001 (my.json) and scheduler.params.{peak} (my.json)"
    assert error_of(resolve, ds) == f"{names} {REPLACED}"


def test_a_rate_of_muons_own_is_reported_too(resolve: Resolve) -> None:
    ds = with_rates("WarmupLR", {"type": "Muon", "params": {"lr": 1e-3, "muon_lr": 0.02}})
    names = "optimizer.params.muon_lr=0.02 (my.json) and scheduler.params.warmup_max_lr=0.001 (my.json)"
    assert error_of(resolve, ds) == f"{names} {REPLACED}"


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
    ("place", "value", "must_be"),
    [
        ("train_micro_batch_size_per_gpu", 0, "above 0"),
        ("gradient_clipping", -1, "at least 0"),
        ("optimizer.params.lr", "fast", "a number"),
        ("optimizer.params.betas", [0.9], "a longer list"),
    ],
)
def test_values_of_the_json_are_held_to_the_recipes_rules(
    place: str, value: Any, must_be: str, resolve: Resolve
) -> None:
    assert error_of(resolve, with_value(place, value)) == f"my.json: {place}={value!r}: must be {must_be}"


def test_a_total_without_a_micro_batch_is_divided_by_the_recipes(resolve: Resolve) -> None:
    assert error_of(resolve, {"train_micro_batch_size_per_gpu": 0, "train_batch_size": 8}) == (
        "train_batch_size=8 (my.json) does not divide by micro-batch 16 x 2 ranks; choose a multiple of 32"
    )
