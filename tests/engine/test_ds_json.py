"""What a DeepSpeed JSON may hold, and how the recipe fills it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from harness.errors import error_of

from dwt_ds.config.recipe import Recipe
from dwt_ds.config.schema import RunConfig
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
Resolve = Callable[..., tuple[RunConfig, dict[str, Any]]]


def autos(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return [found for value in values.values() for found in autos(value)]
    return [values] if values == "auto" else []


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
        ("{", "not valid JSON: Expecting property name"),
        ("", "not valid JSON: Expecting value"),
        ("{'bf16': {}}", "not valid JSON"),
        ("[1]", "holds list; a DeepSpeed JSON is an object in braces"),
        ('{"bf16": {}, "fp16": {}, "bf16": {}}', "'bf16' is a duplicate key; remove one"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' is a duplicate key; remove one"),
    ],
)
def test_an_error_names_an_unreadable_file(text: str, words: str, resolve: Resolve) -> None:
    message = error_of(resolve, text)
    assert message.startswith("my.json: ")
    assert words in message


def test_an_error_names_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"^my\.json: not valid JSON"):
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


def test_another_optimizer_by_override_leaves_out_what_it_does_not_have(recipe: Callable[..., Recipe]) -> None:
    loaded = recipe("deepspeed.optimizer.type=SGD", "train.learning_rate=0.1")
    ds = load_ds_json("zero2_fp32", loaded.config.deepspeed)
    config, values = resolve_batch(loaded, ds, 1)
    values = resolve_schedule(values, loaded, config, 10, ds.origin)
    assert values["optimizer"] == {"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.0}}


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


@pytest.mark.parametrize(
    ("total", "overrides", "message"),
    [
        (
            30,
            ["train.micro_batch_size=8"],
            "train_batch_size=30 (my.json) does not divide by micro-batch 8 x 2 ranks; choose a multiple of 16",
        ),
        (
            0,
            ["train.micro_batch_size=8"],
            "train_batch_size=0 (my.json) does not divide by micro-batch 8 x 2 ranks; choose a multiple of 16",
        ),
        (
            -16,
            ["train.micro_batch_size=8"],
            "train_batch_size=-16 (my.json) does not divide by micro-batch 8 x 2 ranks; choose a multiple of 16",
        ),
        (
            32,
            ["train.micro_batch_size=8", "train.gradient_accumulation_steps=1"],
            'train_batch_size=32 (my.json) is not micro-batch 8 x accumulation 1 x 2 ranks = 16; set it to "auto"',
        ),
    ],
)
def test_a_total_that_does_not_match_is_refused_with_its_factors(
    total: int, overrides: list[str], message: str, resolve: Resolve
) -> None:
    assert error_of(resolve, {"train_batch_size": total}, *overrides) == message


# "auto".


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
    resolve({section: {key: True, **others}})


# Files as Hugging Face's documentation shows them, for its Trainer.

TRAINER_PRECISION = {
    "bf16": {"enabled": "auto"},
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
}
TRAINER_BATCH = {
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
TRAINER_ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
TRAINER_WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}


def test_a_trainers_zero_2_file_with_offload_works(resolve: Resolve) -> None:
    _, values = resolve(
        {
            **TRAINER_PRECISION,
            **TRAINER_BATCH,
            "optimizer": TRAINER_ADAMW,
            "scheduler": {"type": "WarmupLR", "params": TRAINER_WARMUP},
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
                "allgather_partitions": True,
                "allgather_bucket_size": 2e8,
                "overlap_comm": True,
                "reduce_scatter": True,
                "reduce_bucket_size": 2e8,
                "contiguous_gradients": True,
            },
        }
    )
    assert autos(values) == []
    assert values["scheduler"]["params"] == {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 5e-4,
        "warmup_num_steps": 5,
    }
    config = DeepSpeedConfig({**values, "train_batch_size": 16})
    assert (config.bfloat16_config.enabled, config.float16_config.enabled) == (True, False)


def test_a_trainers_zero_3_file_with_nvme_works_and_its_buckets_follow_the_width(resolve: Resolve) -> None:
    _, values = resolve(
        {
            **TRAINER_PRECISION,
            **TRAINER_BATCH,
            "optimizer": TRAINER_ADAMW,
            "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", **TRAINER_WARMUP}},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "pin_memory": True, "buffer_count": 4},
                "offload_param": {"device": "nvme", "nvme_path": "/x", "buffer_size": 1e8, "max_in_cpu": 1e9},
                "overlap_comm": True,
                "contiguous_gradients": True,
                "sub_group_size": 1e9,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
                "stage3_max_live_parameters": 1e9,
                "stage3_max_reuse_distance": 1e9,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "aio": {"block_size": 262144, "queue_depth": 32},
            "communication_data_type": "fp32",
            "checkpoint": {"use_node_local_storage": True},
            "activation_checkpointing": {"partition_activations": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        "student.hidden_size=100",
    )
    assert autos(values) == []
    zero = values["zero_optimization"]
    # transformers' HfTrainerDeepSpeedConfig.trainer_config_finalize fills them by the same products.
    assert zero["reduce_bucket_size"] == 10_000
    assert zero["stage3_prefetch_bucket_size"] == 9_000
    assert zero["stage3_param_persistence_threshold"] == 1_000
    DeepSpeedConfig({**values, "train_batch_size": 16})


def test_the_property_of_an_empty_json_is_no_zero() -> None:
    assert DeepSpeedJson(Origin("x"), {}).zero_stage == 0
