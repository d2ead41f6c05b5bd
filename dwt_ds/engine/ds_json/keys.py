"""The keys that a DeepSpeed JSON may have. DeepSpeed silently ignores a misspelt section, so all are checked here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from dwt_ds.base.words import nearest
from dwt_ds.config.validate import must_be, options_of
from dwt_ds.engine.ds_json.numbers import KIND_OF_TYPE, Kind, check_kind, kind_of, read_numbers
from dwt_ds.engine.ds_json.optimizer_and_schedule import (
    check_optimizer_section,
    check_schedule_section,
    optimizer_kinds,
    schedule_kinds,
)
from dwt_ds.engine.ds_json.origin import Origin

Section = type[BaseModel] | dict[str, Kind | None]
"""The keys that a section may have: a pydantic model's, or these with the kinds of their values; None: any kind."""

# Sections by their place; kinds are those of DeepSpeed's defaults.
_SECTIONS: dict[str, Section] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "optimizer": dict.fromkeys(("type", "params", "legacy_fusion")),
    "scheduler": dict.fromkeys(("type", "params")),
    "torch_autocast": dict.fromkeys(("enabled", "dtype", "lower_precision_safe_modules")),
    "data_types": dict.fromkeys(("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")),
    "activation_checkpointing": {
        "partition_activations": Kind.SWITCH,
        "number_checkpoints": Kind.WHOLE,
        "contiguous_memory_optimization": Kind.SWITCH,
        "synchronize_checkpoint_boundary": Kind.SWITCH,
        "cpu_checkpointing": Kind.SWITCH,
        "profile": Kind.SWITCH,
    },
    "checkpoint": dict.fromkeys(
        ("tag_validation", "checkpoint_serialization", "use_node_local_storage", "parallel_write")
    ),
    "checkpoint.parallel_write": dict.fromkeys(("pipeline_stage",)),
    "flops_profiler": {key: kind_of(value) for key, value in vars(DeepSpeedFlopsProfilerConfig({})).items()},
    "aio": {key: kind_of(value) for key, value in AIO_DEFAULT_DICT.items()},
    "timers": dict.fromkeys(("throughput",)),
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}

_SCALARS: dict[str, Kind] = {
    "communication_data_type": Kind.TEXT,
    "dataloader_drop_last": Kind.SWITCH,
    "disable_allgather": Kind.SWITCH,
    "disable_python_gc": Kind.SWITCH,
    "dump_state": Kind.SWITCH,
    "gradient_accumulation_steps": Kind.WHOLE,
    "gradient_allreduce_op": Kind.TEXT,
    "gradient_clipping": Kind.NUMBER,
    "gradient_predivide_factor": Kind.NUMBER,
    "log_level": Kind.TEXT,
    "memory_breakdown": Kind.SWITCH,
    "prescale_gradients": Kind.SWITCH,
    "seq_parallel_communication_data_type": Kind.TEXT,
    "steps_per_print": Kind.WHOLE,
    "train_batch_size": Kind.WHOLE,
    "train_micro_batch_size_per_gpu": Kind.WHOLE,
    "vocabulary_size": Kind.WHOLE,
    "wall_clock_breakdown": Kind.SWITCH,
    "zero_allow_untested_optimizer": Kind.SWITCH,
    "zero_force_ds_cpu_optimizer": Kind.SWITCH,
}

TOP_LEVEL_KEYS = _SCALARS.keys() | {name for name in _SECTIONS if "." not in name}

_GONE = "DeepSpeed removed it in 2026"
_DATA_PARALLEL = "every rank computes the whole model on its own rows; remove the key"
_NO_EXPERTS = "no student here has experts; remove the key"
_INSTEAD = {
    "aio.thread_count": "DeepSpeed calls it intra_op_parallelism; rename it",
    "amp": f"{_GONE}; use the bf16 or fp16 section",
    "autotuning": "DeepSpeed would end the run after the steps it measures; remove the section and use `dwt-ds plan`",
    "compile": "DeepSpeed would only compile a model that its own `compile()` was called on; remove the section",
    "checkpoint.load_universal": "a resume on another number of ranks converts the checkpoint by itself; remove it",
    "checkpoint.writer": "DeepSpeed 0.19.8 does not read back what its own writers wrote; remove it",
    "compression_training": f"{_GONE}; set student.quantization in the recipe (w8a8, w4a8 or a mapping)",
    "curriculum_learning": f"{_GONE}; remove the section",
    "data_efficiency": "the training loop draws its own rows and runs whole layers; remove the section",
    "datastates_ckpt": "a checkpoint must be complete when its manifest is written; remove the section",
    "eigenvalue": f"{_GONE}; remove the section",
    "elasticity": f"{_GONE}; set the batch sizes",
    "expert_parallel": _NO_EXPERTS,
    "graph_harvesting": f"{_GONE}; remove the key",
    "hybrid_engine": "it is for models that generate text while they train; remove the section",
    "managed_gradient_accumulation": "the training loop counts its own micro-batches; remove the key",
    "optimizer.legacy_fusion": "it is for optimizers of apex that are gone; remove it",
    "nebula": f"{_GONE}; remove the section, checkpoints are written without it",
    "pipeline": _DATA_PARALLEL,
    "progressive_layer_drop": f"{_GONE}; remove the section",
    "quantize_training": f"{_GONE}; set student.quantization in the recipe (w8a8, w4a8 or a mapping)",
    "sequence_parallel_size": _DATA_PARALLEL,
    "sparse_attention": f"{_GONE}; set student.attention in the recipe",
    "sparse_gradients": f"{_GONE}; remove the key",
    "tensor_parallel": _DATA_PARALLEL,
    "use_data_before_expert_parallelism": _NO_EXPERTS,
    "zero_optimization.cpu_offload": "DeepSpeed's old name; write offload_optimizer with device cpu",
    "zero_optimization.cpu_offload_param": "DeepSpeed's old name; write offload_param with device cpu",
    "zero_optimization.cpu_offload_use_pin_memory": "DeepSpeed's old name; write pin_memory in offload_optimizer",
    "zero_optimization.zenflow": "DeepSpeed does not skip bad steps under it; remove the section",
    "weight_quantization": "DeepSpeed reads it for inference alone; set student.quantization in the recipe",
}


def read_all_numbers(config: dict[str, Any]) -> None:
    """Make numbers of those that are written as text or, where they must be whole, as 1e3; in place."""
    read_numbers(config, _SCALARS.get)
    for key in config.keys() & _SECTIONS.keys():
        _read_section(config[key], _SECTIONS[key], key)
    for name, kinds_of in (("optimizer", optimizer_kinds), ("scheduler", schedule_kinds)):
        section = config.get(name)
        if isinstance(section, dict):
            read_numbers(section.get("params"), kinds_of(str(section.get("type"))).get)


def _read_section(section: Any, kind: Section, place: str) -> None:
    if isinstance(kind, dict):
        read_numbers(section, kind.get)
        return
    read_numbers(section, lambda key: KIND_OF_TYPE.get(_hint(kind, key)))
    for key, value in section.items() if isinstance(section, dict) else ():
        inside = _section_inside(kind, key, f"{place}.{key}")
        if inside is not None:
            _read_section(value, inside, f"{place}.{key}")


def check_ds_keys(config: Mapping[str, Any], origin: Origin) -> None:
    """Check the keys of a JSON, with its overrides, and the types of their values.

    Raises ValueError of one line, with the nearest right name, for what DeepSpeed would ignore or refuse.
    """
    for key, value in config.items():
        _refuse(key, origin)
        if key not in TOP_LEVEL_KEYS:
            raise ValueError(f"{origin.name(key)}: unknown key{nearest(key, TOP_LEVEL_KEYS)}")
        if key in _SECTIONS:
            _check_section(value, _SECTIONS[key], key, origin)
        elif isinstance(value, list):
            raise ValueError(f"{origin.name(key)}={value!r}: must be {_SCALARS[key].value}")
        else:
            check_kind(value, _SCALARS[key], origin.name(key))
    if "optimizer" in config:
        check_optimizer_section(config["optimizer"], origin)
    if "scheduler" in config:
        check_schedule_section(config["scheduler"], origin)


def _refuse(place: str, origin: Origin) -> None:
    if place in _INSTEAD:
        raise ValueError(f"{origin.name(place)}: {_INSTEAD[place]}")


def _check_section(section: Any, kind: Section, place: str, origin: Origin) -> None:
    _check_braces(section, place, origin)
    allowed = _allowed_keys(kind)
    for key, value in section.items():
        inner = f"{place}.{key}"
        _refuse(inner, origin)
        if key not in allowed:
            raise ValueError(f"{origin.name(inner)}: unknown key{nearest(key, allowed)}")
        if key == "enabled" and not isinstance(value, bool) and value != "auto":
            raise ValueError(f"{origin.name(inner)}={value!r}: must be true or false")
        # pydantic would take 0 and "off" for false, which checks for false would miss.
        wanted = kind[key] if isinstance(kind, dict) else Kind.SWITCH if bool in options_of(_hint(kind, key)) else None
        if wanted is not None:
            check_kind(value, wanted, origin.name(inner))
        section_inside = _section_inside(kind, key, inner)
        if key == "params":
            _check_braces(value, inner, origin)
        elif section_inside is not None and value is not None:
            _check_section(value, section_inside, inner, origin)
    if not isinstance(kind, dict):
        _check_values(section, kind, place, origin)


def _check_braces(section: Any, place: str, origin: Origin) -> None:
    if not isinstance(section, Mapping):
        raise ValueError(f"{origin.name(place)}={section!r}: must be a section in braces")


def _section_inside(kind: Section, key: str, place: str) -> Section | None:
    """The kind of the section at `key`, None if it is not a section; that of the model if it may be null."""
    if isinstance(kind, dict):
        return _SECTIONS.get(place)
    hints = options_of(_hint(kind, key))
    return next((each for each in hints if inspect.isclass(each) and issubclass(each, BaseModel)), None)


def _hint(model: type[BaseModel], key: str) -> Any:
    """The annotation of the model's field of that name or alias; None if there is none."""
    return next((each.annotation for name, each in model.model_fields.items() if key in (name, each.alias)), None)


def _check_values(section: Mapping[str, Any], model: type[BaseModel], place: str, origin: Origin) -> None:
    """Validate with DeepSpeed's own class for the section, whose error later on would have several lines."""
    try:
        # Nested sections are checked separately.
        model.model_validate({k: v for k, v in section.items() if v != "auto" and not isinstance(v, Mapping)})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a rule over several keys
            raise ValueError(f"{origin.name(place)}: {first['msg'].partition(', ')[2]}") from None
        where = f"{place}.{first['loc'][0]}"
        raise ValueError(f"{origin.name(where)}={first['input']!r}: must be {must_be(first)}") from None


def _allowed_keys(kind: Section) -> set[str]:
    if isinstance(kind, dict):
        return set(kind)
    aliases = {field.alias for field in kind.model_fields.values() if field.alias}
    return set(kind.model_fields) | aliases
