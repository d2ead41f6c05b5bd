"""How recipe and DeepSpeed JSON agree on the global batch, and on the schedule of the learning rate."""

from __future__ import annotations

from typing import Any

import pytest
from harness.ds_values import Resolve
from harness.errors import error_of

# The global batch.


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_the_global_batch_is_micro_batch_times_accumulation_times_ranks(world_size: int, resolve: Resolve) -> None:
    overrides = ("train.micro_batch_size=3", "train.gradient_accumulation_steps=4")
    for ds in ({}, {"train_batch_size": "auto"}, {"train_batch_size": 12 * world_size}):
        _, values = resolve(ds, *overrides, world_size=world_size)
        assert values["train_batch_size"] == 12 * world_size


def test_a_total_in_the_json_sets_the_accumulation(resolve: Resolve) -> None:
    config, values = resolve({"train_batch_size": 96}, "train.micro_batch_size=8")
    assert config.train.gradient_accumulation_steps == values["gradient_accumulation_steps"] == 6
    config, _ = resolve({"train_batch_size": 96, "train_micro_batch_size_per_gpu": 4})
    assert (config.train.micro_batch_size, config.train.gradient_accumulation_steps) == (4, 12)


@pytest.mark.parametrize("total", [30, 0, -16])
def test_a_total_that_does_not_divide_is_refused_with_its_factors(total: int, resolve: Resolve) -> None:
    assert error_of(resolve, {"train_batch_size": total}, "train.micro_batch_size=8") == (
        f"train_batch_size={total} (my.json) does not divide by micro-batch 8 x 2 ranks; choose a multiple of 16"
    )


def test_a_total_that_is_not_the_product_is_refused_with_its_factors(resolve: Resolve) -> None:
    overrides = "train.micro_batch_size=8", "train.gradient_accumulation_steps=1"
    assert error_of(resolve, {"train_batch_size": 32}, *overrides) == (
        'train_batch_size=32 (my.json) is not micro-batch 8 x accumulation 1 x 2 ranks = 16; set it to "auto"'
    )


# The schedule, and "auto".


def test_a_short_run_still_warms_up_for_a_step(resolve: Resolve) -> None:
    _, values = resolve({}, "train.learning_rate=1e-3", total_steps=3)
    params = values["scheduler"]["params"]
    assert (params["warmup_num_steps"], params["warmup_max_lr"]) == (1, 1e-3)


def test_a_schedule_gets_the_length_and_the_rate_that_it_does_not_have_from_the_recipe(resolve: Resolve) -> None:
    rate = {"warmup_max_lr": 2e-3}  # DeepSpeed would take 0.001
    for name, params in (
        ("WarmupDecayLR", {**rate, "total_num_steps": 100}),
        ("WarmupCosineLR", {"total_num_steps": 100}),
    ):
        _, values = resolve({"scheduler": {"type": name}}, "train.learning_rate=2e-3")
        assert values["scheduler"]["params"] == params
    _, values = resolve({"scheduler": {"type": "WarmupStableDecayLR"}}, "train.learning_rate=2e-3")
    assert values["scheduler"]["params"] == {"warmup_num_steps": 5, "total_num_steps": 100, "decay_num_steps": 20}
    assert values["optimizer"]["params"]["lr"] == 2e-3
    message = error_of(resolve, {"scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": 0.1}}})
    assert message == "my.json: scheduler.params: OneCycle needs cycle_min_lr; write it"


@pytest.mark.parametrize(
    ("params", "total_steps", "steps"),
    [
        ({}, 1, 0),
        ({}, 3, 1),
        ({"decay_ratio": 0.1}, 200, 20),
        ({"decay_ratio": 1}, 200, 190),
        ({"decay_ratio": "auto", "decay_num_steps": "auto"}, 200, 40),
        ({"decay_ratio": 0.1, "decay_num_steps": 190}, 200, 190),
        ({"decay_num_steps": 0}, 200, 0),
        ({"warmup_num_steps": 70, "decay_ratio": 0.5}, 100, 30),
    ],
)
def test_a_decay_is_a_share_of_the_run_or_steps_after_the_warm_up(
    params: dict[str, Any], total_steps: int, steps: int, resolve: Resolve
) -> None:
    section = {"type": "WarmupStableDecayLR", "params": params}
    _, values = resolve({"scheduler": section}, f"train.max_steps={total_steps}", total_steps=total_steps)
    found = values["scheduler"]["params"]
    assert (found["total_num_steps"], found["decay_num_steps"]) == (total_steps, steps)
    assert "decay_ratio" not in found


def test_a_decay_that_would_begin_within_the_warm_up_is_refused(resolve: Resolve) -> None:
    section = {"type": "WarmupStableDecayLR", "params": {"decay_num_steps": 96}}
    message = error_of(resolve, {"scheduler": section})
    assert message == (
        "scheduler.params.decay_num_steps=96 (my.json): of the run's 100 steps 5 are the warm-up's; at most 95 are left"
    )
