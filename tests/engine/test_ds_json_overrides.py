"""What overrides under `deepspeed.` do to a JSON: who is named for a mistake, and what another type leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from harness.ds_values import Resolve
from harness.errors import error_of

from dwt_ds.base.trees import get_place
from dwt_ds.config.recipe import Recipe, load_recipe
from dwt_ds.engine.ds_json.keys import check_ds_keys
from dwt_ds.engine.ds_json.load import load_ds_json, packaged_ds_configs
from dwt_ds.engine.ds_json.optimizer_and_schedule import drop_settings_of_another_type
from dwt_ds.engine.ds_json.origin import Origin
from dwt_ds.engine.ds_json.resolve import resolve_batch, resolve_schedule
from dwt_ds.engine.learning_rate import LearningRate
from dwt_ds.engine.optimizers import check_optimizer_and_stage
from dwt_ds.engine.student import check_precision

ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}


def from_packaged(name: str, loaded: Recipe) -> dict[str, Any]:
    """A packaged JSON filled by a recipe, for one rank and 40 steps."""
    ds = load_ds_json(name, loaded.config.deepspeed)
    config, values = resolve_batch(loaded, ds, 1)
    return resolve_schedule(values, loaded, config, 40, ds.origin)


@pytest.mark.parametrize(
    ("ds", "overrides", "message"),
    [
        ({}, ["deepspeed.fooo=1"], "deepspeed.fooo: unknown key"),
        (
            {"optimizer": ADAMW},
            ["deepspeed.optimizer.params.lr=2e-3", "train.learning_rate=1e-3"],
            "train.learning_rate=0.001 (recipe) and deepspeed.optimizer.params.lr=0.002 differ; "
            "remove deepspeed.optimizer.params.lr or make them equal",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}},
            ["deepspeed.scheduler.params.warmup_num_steps=50", "train.warmup_ratio=0.1"],
            "train.warmup_ratio gives 10 (recipe) and deepspeed.scheduler.params.warmup_num_steps=50 differ; "
            "remove deepspeed.scheduler.params.warmup_num_steps or make them equal",
        ),
        (
            {"gradient_clipping": 1.0},
            ["deepspeed.gradient_clipping=-1"],
            "deepspeed.gradient_clipping=-1: must be at least 0",
        ),
        (
            {},
            ["deepspeed.train_batch_size=30", "train.micro_batch_size=8"],
            "deepspeed.train_batch_size=30 does not divide by micro-batch 8 x 2 ranks; choose a multiple of 16",
        ),
        (
            {},
            ["deepspeed.train_batch_size=32", "train.micro_batch_size=8", "train.gradient_accumulation_steps=1"],
            'deepspeed.train_batch_size=32 is not micro-batch 8 x accumulation 1 x 2 ranks = 16; set it to "auto"',
        ),
        (
            {"bf16": {"enabled": True}},
            ["deepspeed.fp16.enabled=true"],
            "my.json: bf16.enabled and deepspeed.fp16.enabled are both on; switch one off",
        ),
        (
            {"bf16": {"enabled": True}},
            ["deepspeed.bf16.check_grad_overflow=false"],
            "deepspeed.bf16.check_grad_overflow=false: bad steps would reach the optimizer; remove it",
        ),
        (
            {},
            ["deepspeed.communication_data_type=auto"],
            'deepspeed.communication_data_type="auto": the recipe has no value for it; write the value',
        ),
        ({}, ["deepspeed.optimizer.type=AdmW"], "deepspeed.optimizer.type='AdmW': unknown optimizer; did you mean"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {}}},
            ["deepspeed.scheduler.type=WarmupLr"],
            "deepspeed.scheduler.type='WarmupLr': unknown schedule; did you mean 'WarmupLR'?",
        ),
        # What the file itself has is the file's, whatever else is overridden.
        ({"stepss_per_print": 5}, ["deepspeed.steps_per_print=1"], "my.json: stepss_per_print: unknown key"),
        (
            {"zero_optimization": {"stagee": 2}},
            ["deepspeed.zero_optimization.stage=1"],
            "my.json: zero_optimization.stagee: unknown key",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 2e-3}}},
            ["deepspeed.optimizer.params.eps=1e-6", "train.learning_rate=1e-3"],
            "train.learning_rate=0.001 (recipe) and optimizer.params.lr=0.002 (my.json) differ; set the one in the",
        ),
    ],
)
def test_a_message_names_the_override_or_the_file_whichever_wrote_the_value(
    ds: dict[str, Any], overrides: list[str], message: str, resolve: Resolve
) -> None:
    assert error_of(resolve, ds, *overrides).startswith(message)


def test_autos_of_another_optimizer_are_dropped_but_not_values() -> None:
    config = {
        "optimizer": {"type": "SGD", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "momentum": 0.9}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "total_num_steps": "auto"}},
    }
    drop_settings_of_another_type(config, {})
    assert config == {
        "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
    }


def test_a_value_of_another_optimizer_is_reported() -> None:
    config = {"optimizer": {"type": "SGD", "params": {"lr": "auto", "eps": 1e-8}}}
    for overrides in ({}, {"optimizer": {"type": "SGD"}}, {"optimizer": {"params": {"eps": 1e-8}}}):
        drop_settings_of_another_type(config, overrides)
        error = error_of(check_ds_keys, config, Origin("my.json"))
        assert error.startswith("my.json: optimizer.params.eps: SGD has no such")


def test_values_go_with_the_type_that_an_override_replaces() -> None:
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 0.0}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear", "warmup_max_lr": "auto"}},
    }
    drop_settings_of_another_type(config, {"optimizer": {"type": "SGD"}, "scheduler": {"type": "LRRangeTest"}})
    assert config["optimizer"]["params"] == {"lr": 0.1, "weight_decay": 0.0}
    assert config["scheduler"]["params"] == {}


def test_a_type_that_nobody_knows_takes_nothing_away() -> None:
    config = {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.99]}}}
    drop_settings_of_another_type(config, {"optimizer": {"type": "SDG"}})
    assert config["optimizer"]["params"] == {"betas": [0.9, 0.99]}


@pytest.mark.parametrize("name", sorted(packaged_ds_configs()))
@pytest.mark.parametrize(
    ("overrides", "params"),
    [
        (["scheduler.type=LRRangeTest"], {}),
        (["scheduler.type=WarmupLR"], {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1, "warmup_num_steps": 2}),
        (["scheduler.type=WarmupCosineLR"], {"warmup_num_steps": 2, "total_num_steps": 40}),
        (
            ["scheduler.type=WarmupStableDecayLR"],
            {"warmup_num_steps": 2, "total_num_steps": 40, "decay_num_steps": 8},
        ),
        (
            ["scheduler.type=OneCycle", "scheduler.params.cycle_min_lr=0.01"],
            {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1},
        ),
        (
            ["scheduler.type=OneCycle", "scheduler.params.cycle_min_lr=0.01", "scheduler.params.cycle_max_lr=auto"],
            {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1},
        ),
    ],
)
def test_another_schedule_by_override_leaves_out_what_it_does_not_have(
    overrides: list[str], params: dict[str, Any], name: str, recipe: Callable[..., Recipe]
) -> None:
    loaded = recipe("train.learning_rate=0.1", *(f"deepspeed.{override}" for override in overrides))
    chosen = from_packaged(name, loaded)["scheduler"]
    assert {key: value for key, value in chosen["params"].items() if key != "warmup_type"} == params
    parameter = torch.nn.Parameter(torch.zeros(1))
    LearningRate(torch.optim.SGD([parameter], lr=0.1), chosen).step()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scheduler.type=OneCycle"], "deepspeed.scheduler.params: OneCycle needs cycle_min_lr; write it"),
        (
            ["scheduler.type=OneCycle", "scheduler.params.cycle_min_lr=0.01", "scheduler.params.cycle_max_lr=0.2"],
            "train.learning_rate gives 0.1 (recipe) and deepspeed.scheduler.params.cycle_max_lr=0.2 differ; remove "
            "deepspeed.scheduler.params.cycle_max_lr or make them equal",
        ),
        (
            ["scheduler.type=OneCycle", "scheduler.params.warmup_type=linear"],
            "deepspeed.scheduler.params.warmup_type: OneCycle has no such setting",
        ),
        (
            ["scheduler.type=LRRangeTest", "scheduler.params.warmup_num_steps=auto"],
            "deepspeed.scheduler.params.warmup_num_steps: LRRangeTest has no such setting",
        ),
        (
            ["optimizer.type=SGD", "optimizer.params.eps=1e-8"],
            "deepspeed.optimizer.params.eps: SGD has no such setting",
        ),
    ],
)
def test_what_the_overrides_write_for_another_type_is_checked(
    overrides: list[str], message: str, recipe: Callable[..., Recipe]
) -> None:
    loaded = recipe("train.learning_rate=0.1", *(f"deepspeed.{override}" for override in overrides))
    assert error_of(from_packaged, "zero2_bf16", loaded).startswith(message)


@pytest.mark.parametrize(
    ("optimizer", "override", "field"),
    [
        ("SGD", "train.betas=[0.9,0.99]", "train.betas=[0.9, 0.99]"),
        ("SGD", "train.eps=1e-6", "train.eps=1e-06"),
        ("Adagrad", "train.betas=[0.9,0.99]", "train.betas=[0.9, 0.99]"),
        ("Lion", "train.eps=1e-6", "train.eps=1e-06"),
        ("Rprop", "train.weight_decay=0.1", "train.weight_decay=0.1"),
    ],
)
def test_a_setting_that_the_optimizer_lacks_is_reported_if_the_recipe_wrote_it(
    optimizer: str, override: str, field: str, resolve: Resolve
) -> None:
    fix = "has no such setting; remove it (a base of the recipe may have it), or choose another optimizer"
    message = error_of(resolve, {"optimizer": {"type": optimizer}}, override)
    assert message == f"{field}: the optimizer {optimizer} (my.json) {fix}"
    message = error_of(resolve, {"optimizer": ADAMW}, f"deepspeed.optimizer.type={optimizer}", override)
    assert message == f"{field}: the optimizer {optimizer} (deepspeed.optimizer.type) {fix}"
    resolve({"optimizer": {"type": optimizer}}, "train.learning_rate=0.1")


def test_a_setting_that_a_base_recipe_wrote_counts(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: paper_lamb\ndeepspeed:\n  optimizer: {type: SGD}\n", encoding="utf-8")
    message = error_of(from_packaged, "zero0", load_recipe(str(path)))
    assert message.startswith("train.eps=1e-06: the optimizer SGD (deepspeed.optimizer.type) has no such setting")


def test_checks_of_the_device_name_the_override_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    overrides = {"fp16": {"enabled": True}, "bf16": {"enabled": False}, "optimizer": {"type": "Lamb"}}
    ds = load_ds_json("zero2_bf16", overrides)
    assert error_of(check_optimizer_and_stage, ds.values, ds.origin).startswith("deepspeed.optimizer.type='Lamb' with")
    assert error_of(check_precision, ds).startswith("deepspeed.fp16.enabled=true: DeepSpeed has no fp16")


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, "optimizer.params.betas"),
        ({"optimizer": {"type": "AdamW", "params": {"eps": None}}}, "optimizer.params.eps"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.1}}}, "scheduler.params.warmup_min_lr"),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0}}}, "scheduler.params.cos_min_ratio"),
    ],
)
def test_null_takes_a_setting_away(section: dict[str, Any], setting: str, resolve: Resolve) -> None:
    _, values = resolve(section, f"deepspeed.{setting}=null")
    assert get_place(values, setting, "not there") == "not there"
