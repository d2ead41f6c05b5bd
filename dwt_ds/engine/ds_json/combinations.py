"""Settings of a DeepSpeed JSON that are right by themselves and wrong together.

DeepSpeed would refuse most of them when its engine starts, after the models are loaded and the run's folder exists.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.utils.logging import log_levels
from pydantic import ValidationError

from dwt_ds.base.trees import get_place
from dwt_ds.base.words import one_line
from dwt_ds.engine.ds_json.origin import Origin

_DTYPES = {"fp32": DtypeEnum.fp32, "bf16": DtypeEnum.bf16, "fp16": DtypeEnum.fp16}
_MASTERS = ("bf16.bf16_master_weights_and_grads", "fp16.fp16_master_weights_and_grads")
_ON_A_GPU = "it needs a GPU's kernels and has not been compared with AdamW; remove it"
_BAD_STEPS = "bad steps would reach the optimizer; remove it"
_ANY_STAGE = (0, 1, 2, 3)
# Values that are refused at these ZeRO stages: place, value, stages, what is wrong and the fix. Bad steps have a NaN in
# the gradient (run/guard.py), which the optimizer has to see.
_REFUSED: tuple[tuple[str, Any, tuple[int, ...], str], ...] = (
    (
        "zero_optimization.round_robin_gradients",
        True,
        (1, 2),
        "DeepSpeed loses track of which weights are which, so exports would be wrong; set it to false",
    ),
    (
        "zero_optimization.load_from_fp32_weights",
        False,
        (1, 2),
        "a resume would begin from weights rounded to 16 bits; remove it",
    ),
    (
        "zero_optimization.elastic_checkpoint",
        True,
        (1, 2),
        "DeepSpeed does not read its own elastic checkpoints with every Adam; remove it, a resume on another number of "
        "ranks converts the checkpoint by itself",
    ),
    (
        "zero_optimization.pipeline_loading_checkpoint",
        True,
        _ANY_STAGE,
        "on several hosts DeepSpeed 0.19.8 passes the turn to the wrong ranks, so a resume would hang; remove it",
    ),
    (
        "zero_optimization.offload_optimizer.device",
        "nvme",
        (1, 2),
        "DeepSpeed has NVMe under ZeRO-3 only, and would use this host's memory; set it to cpu",
    ),
    (
        "zero_optimization.offload_optimizer.device",
        "nvme",
        (3,),
        "DeepSpeed 0.19.8 does not read such an optimizer's checkpoints back as they were; set it to cpu, "
        "zero_optimization.offload_param.device may stay nvme",
    ),
    ("aio.use_gds", True, _ANY_STAGE, _ON_A_GPU),
    ("zero_optimization.zero_quantized_weights", True, _ANY_STAGE, _ON_A_GPU),
    ("zero_optimization.zero_quantized_nontrainable_weights", True, _ANY_STAGE, _ON_A_GPU),
    ("zero_optimization.zero_quantized_gradients", True, _ANY_STAGE, _ON_A_GPU),
    ("zero_optimization.offload_optimizer.super_offload", True, _ANY_STAGE, _ON_A_GPU),
    (
        "checkpoint.checkpoint_serialization",
        False,
        _ANY_STAGE,
        "DeepSpeed 0.19.8 does not read such checkpoints back; remove it",
    ),
    (
        "checkpoint.use_node_local_storage",
        True,
        _ANY_STAGE,
        "a run's folder is shared by its hosts, which would all write one file at once; remove it",
    ),
    ("bf16.check_grad_overflow", False, _ANY_STAGE, _BAD_STEPS),
    ("zero_optimization.compute_grad_norm", False, _ANY_STAGE, _BAD_STEPS),
    ("zero_optimization.legacy_stage1", True, _ANY_STAGE, "DeepSpeed removed it; remove the key"),
)
# Numbers by which DeepSpeed divides, steps_per_print on rank 0 alone: the other ranks would wait for it.
_DIVISORS = ("steps_per_print", "gradient_predivide_factor")


def precision(values: Mapping[str, Any]) -> str:
    """`bf16`, `fp16` or `fp32`: the dtype of the student's weights in the forward pass."""
    # Checkpoints of earlier versions may have the section bf16 under its other name.
    for name, sections in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",))):
        if any(values.get(section, {}).get("enabled") for section in sections):
            return name
    return "fp32"


def compute_precision(values: Mapping[str, Any]) -> str:
    """`bf16`, `fp16` or `fp32`: the dtype of most products, which torch's autocast may lower."""
    autocast = values.get("torch_autocast", {})
    names = [name for name, dtype in _DTYPES.items() if autocast.get("dtype") in dtype._all_values]
    return names[0] if autocast.get("enabled") and names else precision(values)


def zero_stage(values: Mapping[str, Any]) -> int:
    """ZeRO stage, 0 to 3."""
    return int(values.get("zero_optimization", {}).get("stage", 0))


def check_combinations(values: Mapping[str, Any], origin: Origin) -> None:
    """Whether the settings of a JSON without "auto" go together; `engine.optimizers` checks the optimizer's.

    Raises:
        ValueError: one line with place, value and fix.
    """
    _check_autocast(values, origin)
    _check_values(values, origin)
    _check_dtypes(values, origin)
    _check_zero(values, origin)
    for key in _DIVISORS:
        number = values.get(key)
        if number is not None and number <= 0:
            raise ValueError(f"{origin.name(key)}={number}: must be above 0; DeepSpeed divides by it")
    level = values.get("log_level")
    if level is not None and level not in log_levels:
        raise ValueError(f"{origin.name('log_level')}={level!r}: must be one of {', '.join(log_levels)}")
    # The total follows from the others; DeepSpeed would compare it with the ranks that are started now.
    alone = {key: value for key, value in values.items() if key != "train_batch_size"}
    try:
        DeepSpeedConfig(copy.deepcopy(alone))
    except Exception as error:  # assertions, ValueErrors and exceptions of its own
        message = error.errors()[0]["msg"] if isinstance(error, ValidationError) else one_line(error)
        raise ValueError(f"{origin.source}: DeepSpeed refuses these settings: {message}") from None


def _check_autocast(values: Mapping[str, Any], origin: Origin) -> None:
    autocast = values.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("dtype") is None:
        raise ValueError(
            f"{origin.name('torch_autocast.dtype')}: missing; torch would take fp16 on a GPU, and DeepSpeed would not "
            "scale the loss for it; set it to bf16"
        )
    if autocast.get("enabled") and autocast.get("dtype") in DtypeEnum.fp16._all_values:
        raise ValueError(
            f"{origin.name('torch_autocast.dtype')}={autocast['dtype']}: without ZeRO, DeepSpeed does not report the "
            "steps it skips, and under ZeRO on a CPU it skips every step; use bf16, or the fp16 section"
        )


def _check_values(values: Mapping[str, Any], origin: Origin) -> None:
    """Values under which steps cannot be skipped, or two ranks do not train, save or resume as one would;
    docs/deepspeed_keys.md has the table."""
    stage = zero_stage(values)
    for place, value, stages, reason in _REFUSED:
        written = get_place(values, place)
        if stage in stages and written == value and type(written) is type(value):
            said = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(f"{origin.name(place)}={said}: {reason}")
    if stage == 3 and values.get("gradient_predivide_factor", 1.0) != 1.0:
        said = f"{origin.name('gradient_predivide_factor')}={values['gradient_predivide_factor']}"
        raise ValueError(f"{said}: ZeRO-3 would divide the gradients by it and not multiply them again; remove it")
    for place in _MASTERS:
        if get_place(values, place) and not get_place(values, "bf16.bf16_optimizer_states"):
            raise ValueError(
                f"{origin.name(place)}=true: a resume would round Adam's moments to 16 bits; remove it"
                + (", or set bf16.bf16_optimizer_states to true" if "bf16" in place else "")
            )


def _check_dtypes(values: Mapping[str, Any], origin: Origin) -> None:
    ours = precision(values)
    for key in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        place, written = f"data_types.{key}", get_place(values, f"data_types.{key}")
        if written is None:
            continue
        name = next((name for name, dtype in _DTYPES.items() if written in dtype._all_values), None)
        if name is None:
            raise ValueError(f"{origin.name(place)}={written!r}: must be one of {', '.join(_DTYPES)}")
        if key == "grad_accum_dtype" and name != ours and zero_stage(values) == 1 and ours == "bf16":
            raise ValueError(
                f"{origin.name(place)}={written}: under ZeRO-1 with bf16, DeepSpeed changes to an optimizer whose "
                "checkpoints and exports have no weights; remove it, or set zero_optimization.stage to 2"
            )
        if key == "grad_accum_dtype" and name != ours and zero_stage(values) == 0:
            raise ValueError(
                f"{origin.name(place)}={written}: without ZeRO, gradients are accumulated in the dtype of the weights, "
                f"{ours}; remove it, or set zero_optimization.stage to 1, 2 or 3"
            )
        if key == "param_dtype" and name != ours:
            raise ValueError(f"{origin.name(place)}={written}: the JSON's precision is {ours}; remove it")


def _check_zero(values: Mapping[str, Any], origin: Origin) -> None:
    stage, zero = zero_stage(values), values.get("zero_optimization", {})
    if stage >= 2 and zero.get("reduce_scatter", True):
        for key, neutral in (("gradient_predivide_factor", 1.0), ("prescale_gradients", False)):
            if values.get(key, neutral) != neutral:
                raise ValueError(
                    f"{origin.name(key)}={values[key]}: ZeRO-{stage} cannot do that with reduce-scatter; remove it, or "
                    "set zero_optimization.reduce_scatter to false"
                )
    if stage in (1, 2) and zero.get("allgather_bucket_size", 0) % 2:
        place = origin.name("zero_optimization.allgather_bucket_size")
        raise ValueError(f"{place}={zero['allgather_bucket_size']}: must be even under ZeRO-{stage}; add 1")
    for key in ("stage3_module_granularity_threshold", "module_granularity_threshold"):
        if stage == 3 and zero.get(key):
            raise ValueError(
                f"{origin.name(f'zero_optimization.{key}')}={zero[key]}: DeepSpeed would gather models as a whole, "
                "whose parts are called one by one here, and the backward pass would fail; remove it"
            )
    offload = zero.get("offload_param") or {}
    if offload.get("device") == "nvme" and not offload.get("nvme_path"):
        raise ValueError(f"{origin.name('zero_optimization.offload_param')}: nvme needs an nvme_path; add it")
    offloaded = get_place(values, "zero_optimization.offload_optimizer.device") == "cpu"
    for place in _MASTERS:
        if get_place(values, place) and not offloaded:
            raise ValueError(
                f"{origin.name(place)}=true: DeepSpeed has 16-bit master weights with an offloaded optimizer only; "
                "remove it, or set zero_optimization.offload_optimizer.device to cpu"
            )
