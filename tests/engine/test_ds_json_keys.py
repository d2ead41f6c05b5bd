from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from harness.ds_values import nested
from harness.errors import error_of

from dwt_ds.engine.ds_json import keys as ds_keys
from dwt_ds.engine.ds_json.keys import TOP_LEVEL_KEYS, check_ds_keys
from dwt_ds.engine.ds_json.origin import Origin


class Asked(dict[str, Any]):
    """A dict that notes which keys it was asked for, present or not."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.keys_asked: set[str] = set()

    def __contains__(self, key: Any) -> bool:
        self.keys_asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return _AskedKeys(self)


class _AskedKeys:
    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def __contains__(self, key: str) -> bool:
        return key in self.asked

    def __iter__(self) -> Iterator[str]:
        return iter(list(dict.keys(self.asked)))


def check_error(config: dict[str, Any]) -> str:
    message = error_of(check_ds_keys, config, Origin("my.json"))
    assert message.startswith("my.json: ")
    return message.removeprefix("my.json: ")


def test_the_known_and_the_refused_keys_are_those_that_deepspeed_reads() -> None:
    """Guards the lists against a new DeepSpeed.

    DeepSpeed keeps no list of its top-level keys: it looks each one up where it needs it and ignores the rest. So its
    own configuration class is given a dict that notes what it is asked for. When this fails after an update, DeepSpeed
    has a new section or key: add it to the lists of ds_keys.py (or to the refused ones, if it can do nothing here).
    """
    config = Asked({"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    DeepSpeedConfig(config)
    assert len(config.keys_asked) > 40
    # `load_ds_json` writes bfloat16 as bf16.
    assert config.keys_asked - TOP_LEVEL_KEYS - ds_keys._INSTEAD.keys() == {"bfloat16"}
    # The other way round: a key taken out of DeepSpeed would be ignored in silence.
    assert TOP_LEVEL_KEYS - config.keys_asked == set()
    assert TOP_LEVEL_KEYS & ds_keys._INSTEAD.keys() == set()


def asked_inside(place: str) -> set[str]:
    """What DeepSpeed's configuration looks up in the section at a dotted place."""
    asked = Asked({})
    DeepSpeedConfig(nested({"train_batch_size": 1, place: asked}))
    return asked.keys_asked


@pytest.mark.parametrize(
    "place",
    [
        "activation_checkpointing",
        "aio",
        "checkpoint",
        "checkpoint.parallel_write",
        "data_types",
        "flops_profiler",
        "torch_autocast",
    ],
)
def test_the_keys_inside_a_section_are_those_that_deepspeed_reads(place: str) -> None:
    known = ds_keys._SECTIONS[place]
    assert isinstance(known, dict)
    refused = {key.rpartition(".")[2] for key in ds_keys._INSTEAD if key.startswith(f"{place}.")}
    assert asked_inside(place) - refused == known.keys() - refused


@pytest.mark.parametrize(
    ("place", "nearest"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("train_batchsize", "train_batch_size"),
        ("gradient_cliping", "gradient_clipping"),
        ("BF16", "bf16"),
        ("zero_optimization.stagee", "stage"),
        ("zero_optimization.offload_optimizer.devise", "device"),
        ("zero_optimization.offload_param.nvme_pat", "nvme_path"),
        ("zero_optimization.leaf_module.class", "classes"),
        ("aio.block_sizee", "block_size"),
        ("checkpoint.tag_validatin", "tag_validation"),
        ("checkpoint.parallel_write.pipeline_stages", "pipeline_stage"),
        ("timers.throughputt", "throughput"),
        ("timers.throughput.synchronised", "synchronized"),
        ("fp16.loss_scale_windw", "loss_scale_window"),
        ("tensorboard.outputpath", "output_path"),
        ("wandb.grup", "group"),
        ("csv_monitor.jobname", "job_name"),
        ("optimizer.tipe", "type"),
        ("scheduler.parms", "params"),
        ("flops_profiler.profile_steps", "profile_step"),
        ("activation_checkpointing.cpu_checkpoint", "cpu_checkpointing"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(place: str, nearest: str) -> None:
    assert check_error(nested({place: {}})) == f"{place}: unknown key; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("section", "kind", "setting", "nearest"),
    [
        ("optimizer", "AdamW", "beta", "; did you mean 'betas'?"),
        ("optimizer", "SGD", "ns_method", ""),
        ("optimizer", "Muon", "ns_steps", "; did you mean 'eps'?"),
        ("scheduler", "WarmupLR", "total_num_steps", "; did you mean 'warmup_num_steps'?"),
        ("scheduler", "WarmupStableDecayLR", "decay_steps", "; did you mean 'decay_num_steps'?"),
    ],
)
def test_a_setting_that_the_type_lacks_is_refused(section: str, kind: str, setting: str, nearest: str) -> None:
    place = f"{section}.params.{setting}"
    error = check_error(nested({f"{section}.type": kind, place: 5}))
    assert error == f"{place}: {kind} has no such setting{nearest}"


@pytest.mark.parametrize(
    ("section", "kind", "message"),
    [
        ("optimizer", "AdamWW", "unknown optimizer; did you mean 'AdamW'?"),
        ("scheduler", "WarmupStableLR", "unknown schedule; did you mean 'WarmupStableDecayLR'?"),
        ("scheduler", "WarmupDecayLr", "unknown schedule; did you mean 'WarmupDecayLR'?"),
    ],
)
def test_an_unknown_type_is_refused_with_the_nearest_name(section: str, kind: str, message: str) -> None:
    assert check_error({section: {"type": kind}}) == f"{section}.type={kind!r}: {message}"


def test_a_section_without_a_type_is_refused() -> None:
    assert check_error({"optimizer": {}}) == "optimizer.type='': unknown optimizer"


@pytest.mark.parametrize(
    ("place", "value", "must_be"),
    [
        ("zero_optimization.stage", 7, "one of 0, 1, 2, 3"),
        ("zero_optimization.stage", "two", "one of 0, 1, 2, 3"),
        ("zero_optimization.overlap_comm", 3, "true or false"),
        ("zero_optimization.reduce_bucket_size", -1, "above 0"),
        ("zero_optimization.offload_optimizer.device", "gpu", "one of 'none', 'cpu', 'nvme'"),
        ("zero_optimization.leaf_module", True, "a section in braces"),
        ("timers.throughput.enabled", 1.5, "true or false"),
        ("bf16.enabled", "false", "true or false"),
        ("bf16", True, "a section in braces"),
        ("optimizer", "AdamW", "a section in braces"),
        ("optimizer.params", None, "a section in braces"),
        ("zero_optimization", None, "a section in braces"),
        ("gradient_clipping", "1.0", "a number"),
        ("gradient_clipping", True, "a number"),
        ("train_batch_size", 64.0, "a whole number"),
        ("steps_per_print", "often", "a whole number"),
        ("wall_clock_breakdown", "no", "true or false"),
        ("communication_data_type", 16, "text"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_before_deepspeed_sees_it(place: str, value: Any, must_be: str) -> None:
    beside = {"optimizer.type": "AdamW"} if place == "optimizer.params" else {}
    assert check_error(nested({**beside, place: value})) == f"{place}={value!r}: must be {must_be}"


@pytest.mark.parametrize(
    ("schedule", "setting", "value", "must_be"),
    [
        ("WarmupLR", "warmup_type", "linaer", "log or linear"),
        ("WarmupLR", "warmup_num_steps", "ten", "a whole number"),
        ("WarmupStableDecayLR", "decay_type", "sqrt", "linear or 1-sqrt"),
        ("WarmupStableDecayLR", "warmup_type", "sqrt", "log or linear"),
        ("WarmupStableDecayLR", "decay_num_steps", 2.5, "a whole number"),
        ("WarmupStableDecayLR", "decay_num_steps", -1, "at least 0"),
        ("WarmupStableDecayLR", "warmup_num_steps", 0, "at least 1"),
        ("WarmupStableDecayLR", "decay_ratio", 20, "within 0 and 1"),
        ("WarmupStableDecayLR", "decay_ratio", [0.1, 0.2], "within 0 and 1"),
        ("WarmupStableDecayLR", "decay_min_ratio", -0.1, "within 0 and 1"),
        ("WarmupStableDecayLR", "warmup_min_ratio", 10, "within 0 and 1"),
        ("WarmupCosineLR", "cos_min_ratio", 10, "within 0 and 1"),
        ("WarmupCosineLR", "warmup_min_ratio", [0.1], "within 0 and 1"),
        ("WarmupLR", "warmup_min_lr", -6, "at least 0"),
        ("WarmupDecayLR", "warmup_min_lr", [0.0, -6], "at least 0"),
        ("LRRangeTest", "lr_range_test_min_lr", -1e-3, "at least 0"),
        ("OneCycle", "cycle_min_lr", -1e-3, "at least 0"),
        ("OneCycle", "cycle_min_lr", "low", "a number"),
        ("OneCycle", "cycle_momentum", "no", "true or false"),
    ],
)
def test_a_wrong_value_of_a_schedule_is_refused(schedule: str, setting: str, value: Any, must_be: str) -> None:
    place = f"scheduler.params.{setting}"
    error = check_error(nested({"scheduler.type": schedule, place: value}))
    assert error == f"{place}={value!r}: must be {must_be}"


def test_a_norm_that_zero_3_cannot_leave_out_is_refused() -> None:
    error = check_error({"zero_optimization": {"stage": 3, "compute_grad_norm": False}})
    assert error == "zero_optimization: compute_grad_norm=false is supported only with ZeRO Stage 1 or 2"


@pytest.mark.parametrize(
    "key",
    [
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
    ],
)
def test_what_deepspeed_took_out_is_refused_as_such(key: str) -> None:
    assert check_error({key: {}}).startswith(f"{key}: DeepSpeed removed it in 2026; ")


@pytest.mark.parametrize(
    ("name", "instead"),
    [("OneBitAdam", "AdamW"), ("OnebitAdam", "AdamW"), ("OneBitLamb", "Lamb"), ("ZeroOneAdam", "AdamW")],
)
def test_one_bit_optimizers_are_refused_as_taken_out(name: str, instead: str) -> None:
    message = f"optimizer.type={name!r}: DeepSpeed removed its 1-bit optimizers in 2026; use {instead}"
    assert check_error({"optimizer": {"type": name}}) == message


@pytest.mark.parametrize("key", ["tensor_parallel", "sequence_parallel_size", "pipeline"])
def test_splitting_one_model_over_ranks_is_refused(key: str) -> None:
    assert check_error({key: {}}).startswith(f"{key}: every rank computes the whole model on its own rows; ")


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("hybrid_engine", "it is for models that generate text while they train"),
        ("autotuning", "DeepSpeed would end the run"),
        ("data_efficiency", "the training loop draws its own rows"),
        ("datastates_ckpt", "a checkpoint must be complete"),
        ("expert_parallel", "no student here has experts"),
        ("use_data_before_expert_parallelism", "no student here has"),
        ("weight_quantization", "DeepSpeed reads it for inference alone"),
        ("checkpoint.load_universal", "a resume on another number of ranks"),
        ("checkpoint.writer", "DeepSpeed 0.19.8 does not read back"),
        ("compile", "DeepSpeed would only compile a model that its own"),
        ("zero_optimization.zenflow", "DeepSpeed does not skip bad steps under it"),
        ("aio.thread_count", "DeepSpeed calls it intra_op_parallelism; rename it"),
    ],
)
@pytest.mark.parametrize("value", [True, {"foo": 1}])
def test_what_would_do_nothing_or_harm_here_is_refused_with_the_reason(place: str, reason: str, value: Any) -> None:
    assert check_error(nested({place: value})).startswith(f"{place}: {reason}")


def test_what_the_overrides_wrote_is_named_as_theirs() -> None:
    config = {"bf16": {"enabledd": True}}
    for overrides, named in (({}, "my.json: bf16"), (config, "deepspeed.bf16"), ({"bf16": {}}, "my.json: bf16")):
        with pytest.raises(ValueError, match=f"^{named}.enabledd: unknown key; did you mean 'enabled'"):
            check_ds_keys(config, Origin("my.json", overrides))


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "adam_w_mode": False, "torch_adam": True}}},
        {"optimizer": {"type": "adamw", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8}}},
        {"optimizer": {"type": "Lamb", "params": {"lr": 1e-3, "max_coeff": 10.0}}},
        {"optimizer": {"type": "Lion", "params": {"lr": 1e-4, "betas": [0.9, 0.99]}}},
        {"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "adam_lr": 1e-4, "per_head_muon": True}}},
        {"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}}},
        {"optimizer": {"type": "SGD", "params": {"lr": 1e-1, "momentum": 0.9, "nesterov": True}}},
        {"optimizer": {"type": "adagrad", "params": {"lr": 1e-2, "eps": 1e-10, "lr_decay": 0.0}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": [0.0, 0.0], "warmup_type": "log"}}},
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3}}},
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "cos_min_ratio": 0.1}}},
        {"scheduler": {"type": "WarmupStableDecayLR"}},
        {
            "scheduler": {
                "type": "WarmupStableDecayLR",
                "params": {"decay_num_steps": "auto", "decay_ratio": 1, "decay_type": "1-sqrt", "decay_min_ratio": 0.1},
            }
        },
        {"wandb": {"enabled": True, "team": "t", "group": None, "project": "p"}},
        {"comet": {"enabled": True, "project": "p"}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": None, "reduce_bucket_size": 5e8}},
        {"zero_optimization": {"stage": "auto"}},
        {"steps_per_print": None, "gradient_clipping": 1},
        {"aio": {"block_size": 1048576, "queue_depth": 8, "intra_op_parallelism": 1, "use_gds": False}},
        {"checkpoint": {"checkpoint_serialization": False, "parallel_write": {"pipeline_stage": True}}},
        {"timers": {"throughput": {"enabled": True, "synchronized": False}}},
        {"zero_optimization": {"stage": 3, "leaf_module": {"names": ["experts"]}}},
    ],
)
def test_what_deepspeed_knows_is_let_through(config: dict[str, Any]) -> None:
    check_ds_keys(config, Origin("my.json"))
