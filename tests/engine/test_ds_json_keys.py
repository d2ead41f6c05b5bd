from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from dwt_ds.base.trees import set_place
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
    with pytest.raises(ValueError, match=".") as caught:
        check_ds_keys(config, Origin("my.json"))
    message = str(caught.value)
    assert message.startswith("my.json: ")
    assert "\n" not in message
    return message.removeprefix("my.json: ")


def test_every_key_that_deepspeed_reads_is_known_or_refused_with_a_reason() -> None:
    """Guards the lists against a new DeepSpeed.

    DeepSpeed keeps no list of its top-level keys: it looks each one up where it needs it and ignores the rest. So its
    own configuration class is given a dict that notes what it is asked for. When this fails after an update, DeepSpeed
    has a new section or key: add it to the lists of ds_keys.py (or to the refused ones, if it can do nothing here).
    """
    config = Asked({"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    DeepSpeedConfig(config)
    assert len(config.keys_asked) > 40
    assert config.keys_asked - TOP_LEVEL_KEYS - ds_keys._INSTEAD.keys() == set()


def test_no_key_is_known_that_deepspeed_never_reads() -> None:
    """The other way round: a key taken out of DeepSpeed would be ignored in silence."""
    config = Asked({"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    DeepSpeedConfig(config)
    assert TOP_LEVEL_KEYS - config.keys_asked == set()
    assert TOP_LEVEL_KEYS & ds_keys._INSTEAD.keys() == set()


def asked_inside(place: str) -> set[str]:
    """What DeepSpeed's configuration looks up in the section at a dotted place."""
    config: dict[str, Any] = {"train_batch_size": 1}
    asked = Asked({})
    set_place(config, place, asked)
    DeepSpeedConfig(config)
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
    assert isinstance(known, frozenset)
    refused = {key.rpartition(".")[2] for key in ds_keys._INSTEAD if key.startswith(f"{place}.")}
    assert asked_inside(place) - refused == known - refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation: unknown key; did you mean 'zero_optimization'?"),
        ({"train_batchsize": 8}, "train_batchsize: unknown key; did you mean 'train_batch_size'?"),
        ({"gradient_cliping": 1.0}, "gradient_cliping: unknown key; did you mean 'gradient_clipping'?"),
        ({"BF16": {}}, "BF16: unknown key; did you mean 'bf16'?"),
        ({"zero_optimization": {"stagee": 2}}, "zero_optimization.stagee: unknown key; did you mean 'stage'?"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise: unknown key; did you mean 'device'?",
        ),
        (
            {"zero_optimization": {"offload_param": {"nvme_pat": "x"}}},
            "zero_optimization.offload_param.nvme_pat: unknown key; did you mean 'nvme_path'?",
        ),
        (
            {"zero_optimization": {"leaf_module": {"class": []}}},
            "zero_optimization.leaf_module.class: unknown key; did you mean 'classes'?",
        ),
        ({"aio": {"block_sizee": 1}}, "aio.block_sizee: unknown key; did you mean 'block_size'?"),
        (
            {"checkpoint": {"tag_validatin": "Warn"}},
            "checkpoint.tag_validatin: unknown key; did you mean 'tag_validation'?",
        ),
        (
            {"checkpoint": {"parallel_write": {"pipeline_stages": True}}},
            "checkpoint.parallel_write.pipeline_stages: unknown key; did you mean 'pipeline_stage'?",
        ),
        ({"timers": {"throughputt": {}}}, "timers.throughputt: unknown key; did you mean 'throughput'?"),
        (
            {"timers": {"throughput": {"synchronised": False}}},
            "timers.throughput.synchronised: unknown key; did you mean 'synchronized'?",
        ),
        ({"fp16": {"loss_scale_windw": 1}}, "fp16.loss_scale_windw: unknown key; did you mean 'loss_scale_window'?"),
        ({"tensorboard": {"outputpath": "x"}}, "tensorboard.outputpath: unknown key; did you mean 'output_path'?"),
        ({"wandb": {"grup": "x"}}, "wandb.grup: unknown key; did you mean 'group'?"),
        ({"csv_monitor": {"jobname": "x"}}, "csv_monitor.jobname: unknown key; did you mean 'job_name'?"),
        ({"optimizer": {"tipe": "AdamW"}}, "optimizer.tipe: unknown key; did you mean 'type'?"),
        ({"scheduler": {"parms": {}}}, "scheduler.parms: unknown key; did you mean 'params'?"),
        (
            {"optimizer": {"type": "AdamW", "params": {"beta": [0.9, 0.99]}}},
            "optimizer.params.beta: AdamW has no such setting; did you mean 'betas'?",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"ns_method": "gram"}}},
            "optimizer.params.ns_method: SGD has no such setting",
        ),
        (
            {"optimizer": {"type": "Muon", "params": {"ns_steps": 5}}},
            "optimizer.params.ns_steps: Muon has no such setting; did you mean 'eps'?",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 10}}},
            "scheduler.params.total_num_steps: WarmupLR has no such setting; did you mean 'warmup_num_steps'?",
        ),
        (
            {"flops_profiler": {"profile_steps": 1}},
            "flops_profiler.profile_steps: unknown key; did you mean 'profile_step'?",
        ),
        (
            {"activation_checkpointing": {"cpu_checkpoint": True}},
            "activation_checkpointing.cpu_checkpoint: unknown key; did you mean 'cpu_checkpointing'?",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(config: dict[str, Any], message: str) -> None:
    assert check_error(config) == message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamWW"}}, "optimizer.type='AdamWW': unknown optimizer; did you mean 'AdamW'?"),
        (
            {"scheduler": {"type": "WarmupStableLR"}},
            "scheduler.type='WarmupStableLR': unknown schedule; did you mean 'WarmupStableDecayLR'?",
        ),
        (
            {"scheduler": {"type": "WarmupStableDecayLR", "params": {"decay_steps": 10}}},
            "scheduler.params.decay_steps: WarmupStableDecayLR has no such setting; did you mean 'decay_num_steps'?",
        ),
        (
            {"scheduler": {"type": "WarmupDecayLr"}},
            "scheduler.type='WarmupDecayLr': unknown schedule; did you mean 'WarmupDecayLR'?",
        ),
        ({"optimizer": {}}, "optimizer.type='': unknown optimizer"),
    ],
)
def test_an_unknown_type_is_refused_with_the_nearest_name(config: dict[str, Any], message: str) -> None:
    assert check_error(config) == message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage=7: must be one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage='two': must be one of 0, 1, 2, 3"),
        ({"zero_optimization": {"overlap_comm": 3}}, "zero_optimization.overlap_comm=3: must be true or false"),
        (
            {"zero_optimization": {"reduce_bucket_size": -1}},
            "zero_optimization.reduce_bucket_size=-1: must be above 0",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
            "zero_optimization.offload_optimizer.device='gpu': must be one of 'none', 'cpu', 'nvme'",
        ),
        (
            {"zero_optimization": {"leaf_module": True}},
            "zero_optimization.leaf_module=True: must be a section in braces",
        ),
        (
            {"zero_optimization": {"stage": 3, "compute_grad_norm": False}},
            "zero_optimization: compute_grad_norm=false is supported only with ZeRO Stage 1 or 2",
        ),
        ({"timers": {"throughput": {"enabled": 1.5}}}, "timers.throughput.enabled=1.5: must be true or false"),
        ({"bf16": {"enabled": "false"}}, "bf16.enabled='false': must be true or false"),
        ({"bf16": True}, "bf16=True: must be a section in braces"),
        ({"optimizer": "AdamW"}, "optimizer='AdamW': must be a section in braces"),
        ({"optimizer": {"type": "AdamW", "params": None}}, "optimizer.params=None: must be a section in braces"),
        ({"zero_optimization": None}, "zero_optimization=None: must be a section in braces"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping='1.0': must be a number"),
        ({"gradient_clipping": True}, "gradient_clipping=True: must be a number"),
        ({"train_batch_size": 64.0}, "train_batch_size=64.0: must be a whole number"),
        ({"steps_per_print": "often"}, "steps_per_print='often': must be a whole number"),
        ({"wall_clock_breakdown": "no"}, "wall_clock_breakdown='no': must be true or false"),
        ({"communication_data_type": 16}, "communication_data_type=16: must be text"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linaer"}}},
            "scheduler.params.warmup_type='linaer': must be log or linear",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "ten"}}},
            "scheduler.params.warmup_num_steps='ten': must be a whole number",
        ),
        *(
            ({"scheduler": {"type": "WarmupStableDecayLR", "params": {key: value}}}, f"scheduler.params.{key}{message}")
            for key, value, message in (
                ("decay_type", "sqrt", "='sqrt': must be linear or 1-sqrt"),
                ("warmup_type", "sqrt", "='sqrt': must be log or linear"),
                ("decay_num_steps", 2.5, "=2.5: must be a whole number"),
                ("decay_num_steps", -1, "=-1: must be at least 0"),
                ("warmup_num_steps", 0, "=0: must be at least 1"),
                ("decay_ratio", 20, "=20: must be within 0 and 1"),
                ("decay_ratio", [0.1, 0.2], "=[0.1, 0.2]: must be within 0 and 1"),
                ("decay_min_ratio", -0.1, "=-0.1: must be within 0 and 1"),
            )
        ),
        (
            {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": "low"}}},
            "scheduler.params.cycle_min_lr='low': must be a number",
        ),
        (
            {"scheduler": {"type": "OneCycle", "params": {"cycle_momentum": "no"}}},
            "scheduler.params.cycle_momentum='no': must be true or false",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_before_deepspeed_sees_it(config: dict[str, Any], message: str) -> None:
    assert check_error(config) == message


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
    ("config", "message"),
    [
        ({"hybrid_engine": {"enabledd": True}}, "hybrid_engine: it is for models that generate text while they train"),
        ({"autotuning": {"foo": 1}}, "autotuning: DeepSpeed would end the run"),
        ({"data_efficiency": {"foo": 1}}, "data_efficiency: the training loop draws its own rows"),
        ({"datastates_ckpt": {"foo": 1}}, "datastates_ckpt: a checkpoint must be complete"),
        ({"expert_parallel": {"foo": 1}}, "expert_parallel: no student here has experts"),
        ({"use_data_before_expert_parallelism": True}, "use_data_before_expert_parallelism: no student here has"),
        ({"weight_quantization": {"foo": 1}}, "weight_quantization: DeepSpeed reads it for inference alone"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal: a resume on another number of ranks"),
        ({"checkpoint": {"writer": {"foo": 1}}}, "checkpoint.writer: DeepSpeed 0.19.8 does not read back"),
        ({"compile": {"deepcompile": True}}, "compile: DeepSpeed would only compile a model that its own"),
        (
            {"zero_optimization": {"zenflow": {}}},
            "zero_optimization.zenflow: DeepSpeed does not skip bad steps under it",
        ),
        ({"aio": {"thread_count": 1}}, "aio.thread_count: DeepSpeed calls it intra_op_parallelism; rename it"),
    ],
)
def test_what_would_do_nothing_or_harm_here_is_refused_with_the_reason(config: dict[str, Any], message: str) -> None:
    assert check_error(config).startswith(message)


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
