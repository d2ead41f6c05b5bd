"""Which keys a DeepSpeed JSON may hold.

DeepSpeed ignores a misspelt top-level section without a word, so every key is checked here before it sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from pydantic import BaseModel, ValidationError

from dwt_ds.engine.optimizers import CLIENT_OPTIMIZERS
from dwt_ds.recipe import must_be, nearest

_SECTIONS: dict[str, type[BaseModel] | frozenset[str]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "scheduler": frozenset({"type", "params"}),
    "torch_autocast": frozenset({"enabled", "dtype", "lower_precision_safe_modules"}),
    "data_types": frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}),
    "activation_checkpointing": frozenset(
        {
            "partition_activations",
            "number_checkpoints",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "cpu_checkpointing",
            "profile",
        }
    ),
    "checkpoint": frozenset({"tag_validation", "load_universal", "use_node_local_storage", "parallel_write", "writer"}),
    "flops_profiler": frozenset(DeepSpeedFlopsProfilerConfig({}).__dict__),
}

# Sections whose inside DeepSpeed reads in its own ways; their names are checked, their contents are not.
_OPEN_SECTIONS = frozenset(
    {
        "aio",
        "autotuning",
        "data_efficiency",
        "datastates_ckpt",
        "expert_parallel",
        "hybrid_engine",
        "timers",
        "weight_quantization",
    }
)

_SCALARS: dict[str, type] = {
    "communication_data_type": str,
    "dataloader_drop_last": bool,
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "dump_state": bool,
    "gradient_accumulation_steps": int,
    "gradient_allreduce_op": str,
    "gradient_clipping": float,
    "gradient_predivide_factor": float,
    "log_level": str,
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "seq_parallel_communication_data_type": str,
    "steps_per_print": int,
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "use_data_before_expert_parallelism": bool,
    "vocabulary_size": int,
    "wall_clock_breakdown": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
}
_IN_WORDS: dict[type, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}

TOP_LEVEL_KEYS = _SCALARS.keys() | _OPEN_SECTIONS | {name for name in _SECTIONS if "." not in name}

_GONE = "DeepSpeed took it out in 2026"
_DATA_PARALLEL = "every rank has its own rows here and the whole model's work on them; remove the key"
_INSTEAD = {
    "amp": f"{_GONE}; use the bf16 or fp16 section",
    "compression_training": f"{_GONE}; set student.quantization in the recipe (w8a8, w4a8 or a mapping)",
    "curriculum_learning": f"{_GONE}; remove the section",
    "eigenvalue": f"{_GONE}; remove the section",
    "elasticity": f"{_GONE}; set the batch sizes",
    "graph_harvesting": f"{_GONE}; remove the key",
    "managed_gradient_accumulation": "the training loop counts its own micro-batches; remove the key",
    "nebula": f"{_GONE}; remove the section, checkpoints are written without it",
    "pipeline": _DATA_PARALLEL,
    "progressive_layer_drop": f"{_GONE}; remove the section",
    "quantize_training": f"{_GONE}; set student.quantization in the recipe (w8a8, w4a8 or a mapping)",
    "sequence_parallel_size": _DATA_PARALLEL,
    "sparse_attention": f"{_GONE}; set student.attention in the recipe",
    "sparse_gradients": f"{_GONE}; remove the key",
    "tensor_parallel": _DATA_PARALLEL,
}

_ONE_BIT = frozenset({"onebitadam", "onebitlamb", "zerooneadam"})

_WARMUP_TYPES = (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)
_SCHEDULE_NUMBERS = frozenset({"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"})

# What DeepSpeed takes out of an optimizer's params before it constructs the optimizer.
_DEEPSPEED_OPTIMIZER_EXTRAS = frozenset(
    {"adam_w_mode", "torch_adam", "fp32_optimizer_states", "foreach", "momentum", "ns_method", "muon_lr", "adam_lr"}
)


def check_ds_keys(config: Mapping[str, Any], source: str) -> None:
    """Raise ValueError (one line, nearest right name) for a key or value that DeepSpeed would ignore or refuse.

    `source` names the file in messages.
    """
    for key, value in config.items():
        if key in _INSTEAD:
            raise ValueError(f"{source}: {key}: {_INSTEAD[key]}")
        if key not in TOP_LEVEL_KEYS:
            raise ValueError(f"{source}: {key}: unknown key{nearest(key, TOP_LEVEL_KEYS)}")
        if key in _SCALARS:
            _check_scalar(value, key, source)
        else:
            _check_section(value, key, source)
    _check_optimizer(config.get("optimizer"), source)
    _check_scheduler(config.get("scheduler"), source)


def drop_foreign_autos(config: dict[str, Any]) -> None:
    """Take out "auto" settings that the named optimizer or scheduler does not have.

    So that an override of only the type works on a file whose params were written for another one.
    """
    for section, allowed_of in (("optimizer", _optimizer_settings), ("scheduler", _scheduler_settings)):
        chosen = config.get(section)
        if not isinstance(chosen, dict) or not isinstance(chosen.get("params"), dict):
            continue
        allowed = allowed_of(str(chosen.get("type", "")))
        if allowed:
            chosen["params"] = {k: v for k, v in chosen["params"].items() if v != "auto" or k in allowed}


def _check_scalar(value: Any, key: str, source: str) -> None:
    kind = _SCALARS[key]
    if value in ("auto", None) or type(value) is kind or (kind is float and type(value) is int):
        return
    raise ValueError(f"{source}: {key}={value!r}: must be {_IN_WORDS[kind]}")


def _check_section(section: Any, name: str, source: str) -> None:
    if not isinstance(section, Mapping):
        raise ValueError(f"{source}: {name}={section!r}: must be a section in braces")
    if name not in _SECTIONS:
        return
    allowed = _allowed_keys(_SECTIONS[name])
    for key, value in section.items():
        if key not in allowed:
            raise ValueError(f"{source}: {name}.{key}: unknown key{nearest(key, allowed)}")
        if key == "enabled" and not isinstance(value, bool) and value != "auto":
            raise ValueError(f"{source}: {name}.enabled={value!r}: must be true or false")
        if key == "params" or (f"{name}.{key}" in _SECTIONS and value is not None):
            _check_section(value, f"{name}.{key}", source)
    _check_values(section, name, source)


def _check_values(section: Mapping[str, Any], name: str, source: str) -> None:
    """By DeepSpeed's own class for the section, which would say the same over several lines and only later."""
    model = _SECTIONS[name]
    if isinstance(model, frozenset):
        return
    try:
        # The sections inside have been checked by themselves.
        model.model_validate({k: v for k, v in section.items() if v != "auto" and not isinstance(v, Mapping)})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"][:1])])
        raise ValueError(f"{source}: {where}={first['input']!r}: must be {must_be(first)}") from None


def _allowed_keys(section: type[BaseModel] | frozenset[str]) -> set[str]:
    if isinstance(section, frozenset):
        return set(section)
    aliases = {field.alias for field in section.model_fields.values() if field.alias}
    return set(section.model_fields) | aliases


def _check_optimizer(section: Mapping[str, Any] | None, source: str) -> None:
    if section is None:
        return
    name = str(section.get("type", ""))
    if name.lower() in _ONE_BIT:
        instead = "Lamb" if "lamb" in name.lower() else "AdamW"
        raise ValueError(
            f"{source}: optimizer.type={name!r}: DeepSpeed took its 1-bit optimizers out in 2026; use {instead}"
        )
    allowed = _optimizer_settings(name)
    if not allowed:
        raise ValueError(f"{source}: optimizer.type={name!r}: unknown optimizer{nearest(name, _optimizer_names())}")
    for key in section.get("params", {}):
        if key == "max_grad_norm":
            raise ValueError(f"{source}: optimizer.params.{key}: DeepSpeed clips by itself; set gradient_clipping")
        if key not in allowed:
            raise ValueError(f"{source}: optimizer.params.{key}: {name} has no such setting{nearest(key, allowed)}")


def _optimizer_settings(name: str) -> set[str]:
    if name in CLIENT_OPTIMIZERS:
        return set(CLIENT_OPTIMIZERS[name])
    classes = _optimizer_classes(name)
    return set(_DEEPSPEED_OPTIMIZER_EXTRAS).union(*(_parameters(c) for c in classes)) if classes else set()


def _scheduler_settings(name: str) -> set[str]:
    return _parameters(getattr(lr_schedules, name)) if name in lr_schedules.VALID_LR_SCHEDULES else set()


def _optimizer_names() -> list[str]:
    own = [name for name, value in vars(torch.optim).items() if inspect.isclass(value)]
    return [*own, "Lamb", "Lion", "Muon", *CLIENT_OPTIMIZERS]


def _optimizer_classes(name: str) -> list[type]:
    from deepspeed.ops import adam, lamb, lion

    deepspeed_classes: dict[str, list[type]] = {
        "adam": [adam.FusedAdam, adam.DeepSpeedCPUAdam],
        "adamw": [adam.FusedAdam, adam.DeepSpeedCPUAdam],
        "lamb": [lamb.FusedLamb],
        "lion": [lion.FusedLion, lion.DeepSpeedCPULion],
        "muon": [adam.FusedAdam],
    }
    found = list(deepspeed_classes.get(name.lower(), []))
    torch_class = getattr(torch.optim, name, None)
    return [*found, torch_class] if inspect.isclass(torch_class) else found


def _check_scheduler(section: Mapping[str, Any] | None, source: str) -> None:
    if section is None:
        return
    name = str(section.get("type", ""))
    allowed = _scheduler_settings(name)
    if not allowed:
        names = lr_schedules.VALID_LR_SCHEDULES
        raise ValueError(f"{source}: scheduler.type={name!r}: unknown schedule{nearest(name, names)}")
    for key, value in section.get("params", {}).items():
        if key not in allowed:
            raise ValueError(f"{source}: scheduler.params.{key}: {name} has no such setting{nearest(key, allowed)}")
        if key == "warmup_type" and value not in _WARMUP_TYPES:  # DeepSpeed would take log
            raise ValueError(f"{source}: scheduler.params.{key}={value!r}: must be {' or '.join(_WARMUP_TYPES)}")
        if key in _SCHEDULE_NUMBERS and isinstance(value, str) and value != "auto":
            raise ValueError(f"{source}: scheduler.params.{key}={value!r}: must be a number")


def _parameters(owner: type) -> set[str]:
    return set(inspect.signature(owner).parameters) - {"params", "model_params", "optimizer", "self"}
