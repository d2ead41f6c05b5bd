"""What a DeepSpeed JSON may hold, and how the recipe fills it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from harness.ds_values import Resolve, autos
from harness.errors import error_of

from dwt_ds.config.recipe import Recipe
from dwt_ds.engine.ds_json.load import DeepSpeedJson, load_ds_json, packaged_ds_configs
from dwt_ds.engine.ds_json.origin import Origin
from dwt_ds.engine.ds_json.resolve import resolve_batch, resolve_schedule

PUBLIC_CONFIGS = {
    "zero0": (0, "bf16"),
    "zero1": (1, "bf16"),
    "zero2_bf16": (2, "bf16"),
    "zero2_fp16": (2, "fp16"),
    "zero2_fp32": (2, "fp32"),
    "zero2_offload": (2, "bf16"),
    "zero3": (3, "bf16"),
}


# The files that come with the project.


def test_the_packaged_files_are_the_promised_ones() -> None:
    assert set(packaged_ds_configs()) == set(PUBLIC_CONFIGS)


@pytest.mark.parametrize("name", sorted(PUBLIC_CONFIGS))
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_every_packaged_file_is_filled_by_the_recipe_and_taken_by_deepspeed(
    name: str, world_size: int, recipe: Callable[..., Recipe]
) -> None:
    overrides = ["train.micro_batch_size=4", "train.gradient_accumulation_steps=3", "train.learning_rate=2e-4"]
    overrides += ["train.weight_decay=0.1", "train.betas=[0.8, 0.95]", "train.eps=1e-7", "train.max_grad_norm=0.5"]
    loaded = recipe(*overrides)
    ds = load_ds_json(name, {})
    assert (ds.zero_stage, ds.precision) == PUBLIC_CONFIGS[name]
    assert autos(ds.values)
    config, values = resolve_batch(loaded, ds, world_size)
    values = resolve_schedule(values, loaded, config, 200, ds.origin)
    assert autos(values) == []
    assert config == loaded.config
    assert values["train_batch_size"] == 4 * 3 * world_size
    assert values["train_micro_batch_size_per_gpu"] == 4
    assert values["gradient_accumulation_steps"] == 3
    assert values["gradient_clipping"] == 0.5
    optimizer = {"lr": 2e-4, "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.1}
    assert values["optimizer"] == {"type": "AdamW", "params": optimizer}
    # 5% of 200 steps.
    warmup = {"warmup_min_lr": 0.0, "warmup_max_lr": 2e-4, "warmup_num_steps": 10, "total_num_steps": 200}
    assert values["scheduler"] == {"type": "WarmupDecayLR", "params": {"warmup_type": "linear", **warmup}}
    json.dumps(values)

    # Outside a process group DeepSpeed takes itself for the only rank.
    alone = DeepSpeedConfig({**values, "train_batch_size": 12})
    assert alone.zero_config.stage == PUBLIC_CONFIGS[name][0]
    assert alone.zero_config.overlap_comm in (False, None)
    assert alone.bfloat16_config.enabled == (PUBLIC_CONFIGS[name][1] == "bf16")
    assert alone.float16_config.enabled == (PUBLIC_CONFIGS[name][1] == "fp16")


def test_the_offloading_file_offloads_the_optimizer() -> None:
    assert load_ds_json("zero2_offload", {}).values["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_filling_changes_neither_the_file_nor_the_recipe(recipe: Callable[..., Recipe]) -> None:
    ds = load_ds_json("zero2_bf16", {})
    before = json.dumps(ds.values)
    loaded = recipe()
    config, values = resolve_batch(loaded, ds, 2)
    half = json.dumps(values)
    resolve_schedule(values, loaded, config, 10, ds.origin)
    assert json.dumps(ds.values) == before
    assert json.dumps(values) == half


# Finding and reading.


def test_a_path_goes_before_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero3").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    assert load_ds_json("zero3", {}).zero_stage == 1


def test_a_missing_file_is_reported_with_the_nearest_name() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_ds_json("zero2_b16", {})
    message = str(caught.value)
    assert message.startswith("deepspeed_config 'zero2_b16': no such file")
    assert "did you mean 'zero2_bf16'?" in message
    assert "zero2_offload" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{'bf16': {}}", "not valid JSON"),
        ("[1]", "holds list; a DeepSpeed JSON is an object in braces"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' is a duplicate key; remove one"),
    ],
)
def test_an_error_names_an_unreadable_file(text: str, words: str, resolve: Resolve) -> None:
    message = error_of(resolve, text)
    assert message.startswith("my.json: ")
    assert words in message


def test_an_error_names_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"^my\.json: cannot be read: "):
        load_ds_json(str(tmp_path / "my.json"), {})


# Overrides under deepspeed.


def test_overrides_reach_into_the_file_or_add_to_it(resolve: Resolve) -> None:
    config, values = resolve(
        {"zero_optimization": {"stage": 2, "contiguous_gradients": True}},
        "deepspeed.zero_optimization.stage=1",
        "deepspeed.tensorboard.enabled=true",
        "deepspeed.gradient_clipping=2e-1",
    )
    assert values["zero_optimization"] == {"stage": 1, "contiguous_gradients": True}
    assert values["tensorboard"] == {"enabled": True}
    assert values["gradient_clipping"] == config.train.max_grad_norm == 0.2


def test_overrides_are_held_to_the_same_keys(resolve: Resolve) -> None:
    message = error_of(resolve, {}, "deepspeed.zero_optimization.stagee=1")
    assert message == "deepspeed.zero_optimization.stagee: unknown key; did you mean 'stage'?"
    message = error_of(resolve, {"steps_per_print": 5}, "deepspeed.steps_per_print.x=1")
    assert message == "deepspeed.steps_per_print: my.json has 5 there, not a section"
    message = error_of(resolve, {"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage.x=1")
    assert message == "deepspeed.zero_optimization.stage: my.json has 2 there, not a section"


@pytest.mark.parametrize(
    ("ds", "place"),
    [
        ({"wandb": {"enabled": "auto"}}, "wandb.enabled"),
        ({"communication_data_type": "auto"}, "communication_data_type"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage"),
        (
            {"scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": "auto"}}},
            "scheduler.params.lr_range_test_min_lr",
        ),
    ],
)
def test_an_auto_that_the_recipe_cannot_fill_is_reported(ds: dict[str, Any], place: str, resolve: Resolve) -> None:
    assert error_of(resolve, ds) == f'my.json: {place}="auto": the recipe has no value for it; write the value'


@pytest.mark.parametrize(
    ("ds", "precision"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "bf16"),
        ({"bf16": {"enabled": "auto"}}, "bf16"),
        ({"fp16": {"enabled": "auto"}}, "fp32"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}, "fp16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": "auto"}}, "bf16"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": "auto"}}, "fp32"),
        ({"bf16": {}}, "fp32"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
    ],
)
def test_the_precision_is_the_jsons(ds: dict[str, Any], precision: str, tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text(json.dumps(ds), encoding="utf-8")
    loaded = load_ds_json(str(path), {})
    assert loaded.precision == precision
    assert "auto" not in [section.get("enabled") for section in loaded.values.values()]


def test_two_precisions_at_once_are_an_error(resolve: Resolve) -> None:
    message = error_of(resolve, {"bf16": {"enabled": True}, "fp16": {"enabled": True}})
    assert message == "my.json: bf16.enabled and fp16.enabled are both on; switch one off"


@pytest.mark.parametrize(
    ("section", "key", "others"),
    [("bf16", "check_grad_overflow", {}), ("zero_optimization", "compute_grad_norm", {"stage": 2})],
)
def test_the_check_that_skips_bad_steps_stays_on(
    section: str, key: str, others: dict[str, Any], resolve: Resolve
) -> None:
    message = error_of(resolve, {section: {key: False, **others}})
    assert message == f"my.json: {section}.{key}=false: bad steps would reach the optimizer; remove it"
    assert error_of(resolve, {section: {key: 0, **others}}) == f"my.json: {section}.{key}=0: must be true or false"
    resolve({section: {key: True, **others}})


def test_the_property_of_an_empty_json_is_no_zero() -> None:
    assert DeepSpeedJson(Origin("x"), {}).zero_stage == 0


def test_a_path_in_the_json_is_read_as_the_recipes_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/nvme")
    monkeypatch.delenv("NOWHERE", raising=False)
    path = tmp_path / "my.json"
    offload = {"offload_param": {"device": "nvme", "nvme_path": "${DISK}/a"}}
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 3, **offload}, "tensorboard": {"output_path": "~/logs"}})
    )
    values = load_ds_json(str(path), {"csv_monitor": {"output_path": "a$b #2"}}).values
    assert values["zero_optimization"]["offload_param"]["nvme_path"] == "/nvme/a"
    assert values["tensorboard"]["output_path"] == "/home/me/logs"
    assert values["csv_monitor"]["output_path"] == "a$b #2"
    said = "deepspeed.csv_monitor.output_path='${NOWHERE}/x': NOWHERE is not set; export it, or write the path out"
    assert error_of(load_ds_json, str(path), {"csv_monitor": {"output_path": "${NOWHERE}/x"}}) == said
