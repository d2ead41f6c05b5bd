"""The settings of each optimizer and learning-rate schedule that a DeepSpeed JSON can name as `type`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from deepspeed.runtime import lr_schedules

from dwt_ds.base.words import nearest
from dwt_ds.engine.ds_json.numbers import Kind, check_kind
from dwt_ds.engine.ds_json.origin import Origin
from dwt_ds.engine.learning_rate import SCHEDULES
from dwt_ds.engine.optimizers import CLIENT_OPTIMIZERS
from dwt_ds.engine.warmup_stable_decay import DECAY_TYPES

_ONE_BIT = frozenset({"onebitadam", "onebitlamb", "zerooneadam"})

# Read by DeepSpeed itself: they decide which Adam class it constructs, and how.
_ADAM_EXTRAS = dict.fromkeys(("adam_w_mode", "torch_adam", "fp32_optimizer_states", "foreach"), Kind.SWITCH)
_MUON = {
    **dict.fromkeys(("lr", "muon_lr", "momentum", "adam_lr", "betas", "eps", "weight_decay"), Kind.NUMBER),
    "ns_method": Kind.TEXT,
    "per_head_muon": Kind.SWITCH,
}
_OF_CLIENTS = dict.fromkeys(("bias_correction", "adam_w_mode", "grad_averaging", "use_nvlamb"), Kind.SWITCH)

_CHOICES = {
    "warmup_type": (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE),  # DeepSpeed would take log
    "decay_type": DECAY_TYPES,
}
_AT_LEAST_1 = frozenset({"warmup_num_steps", "lr_range_test_step_size", "cycle_first_step_size"})
_AT_LEAST_0 = frozenset({"decay_num_steps", "warmup_min_lr", "cycle_min_lr", "lr_range_test_min_lr"})
_WITHIN_0_AND_1 = frozenset({"decay_ratio", "decay_min_ratio", "warmup_min_ratio", "cos_min_ratio"})


@lru_cache
def optimizer_kinds(name: str) -> dict[str, Kind]:
    """The settings that `optimizer.params` may have with this type, and their kinds; empty for an unknown type."""
    if name in CLIENT_OPTIMIZERS:
        return {key: _OF_CLIENTS.get(key, Kind.NUMBER) for key in CLIENT_OPTIMIZERS[name]}
    from deepspeed.ops import adagrad, adam, lamb, lion

    adams = _kinds(adam.FusedAdam, adam.DeepSpeedCPUAdam, torch.optim.Adam, torch.optim.AdamW) | _ADAM_EXTRAS
    deepspeeds = {  # these names are case-insensitive in DeepSpeed
        "adam": adams,
        "adamw": adams,
        "adagrad": _kinds(adagrad.DeepSpeedCPUAdagrad, torch.optim.Adagrad),
        "lamb": _kinds(lamb.FusedLamb),
        "lion": _kinds(lion.FusedLion, lion.DeepSpeedCPULion),
        "muon": _MUON | _ADAM_EXTRAS,
    }
    del adams["adamw_mode"]
    if name.lower() in deepspeeds:
        return deepspeeds[name.lower()]
    torch_class = getattr(torch.optim, name, None)
    return _kinds(torch_class) if inspect.isclass(torch_class) else {}


@lru_cache
def schedule_kinds(name: str) -> dict[str, Kind]:
    """The settings that `scheduler.params` may have with this type, and their kinds; empty for an unknown type."""
    return _kinds(SCHEDULES[name]) if name in SCHEDULES else {}


def schedule_needs(name: str) -> list[str]:
    """The settings of a known schedule that have no default."""
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.name != "optimizer"]


def drop_settings_of_another_type(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Remove from a file the optimizer and scheduler settings that were written for another type.

    If `overrides` name another type, these are all settings that it does not have. Otherwise, these are such settings
    with the value "auto", since many files are written for AdamW first. Settings of the overrides themselves stay, so
    that they are checked.
    """
    for section, kinds_of in (("optimizer", optimizer_kinds), ("scheduler", schedule_kinds)):
        written = values.get(section)
        if not isinstance(written, dict) or not isinstance(written.get("params"), dict):
            continue
        over = overrides.get(section)
        chosen = over.get("type", written.get("type")) if isinstance(over, Mapping) else written.get("type")
        another = chosen != written.get("type")
        known = kinds_of(str(chosen))
        if known:
            written["params"] = {
                key: value
                for key, value in written["params"].items()
                if key in known or not (another or value == "auto")
            }


def drop_null_settings(values: dict[str, Any]) -> None:
    """Remove the settings of optimizer and scheduler that are null: they are as if they were not written."""
    for section in (values.get("optimizer"), values.get("scheduler")):
        if isinstance(section, dict) and isinstance(section.get("params"), dict):
            section["params"] = {key: value for key, value in section["params"].items() if value is not None}


def check_optimizer_section(section: Mapping[str, Any], origin: Origin) -> None:
    """Raise a one-line ValueError for an unknown type, or a setting that the type does not have."""
    name = str(section.get("type", ""))
    said = f"{origin.name('optimizer.type')}={name!r}"
    if name.lower() in _ONE_BIT:
        instead = "Lamb" if "lamb" in name.lower() else "AdamW"
        raise ValueError(f"{said}: DeepSpeed removed its 1-bit optimizers in 2026; use {instead}")
    kinds = optimizer_kinds(name)
    if not kinds:
        raise ValueError(f"{said}: unknown optimizer{nearest(name, _optimizer_names())}")
    for key, value in section.get("params", {}).items():
        place = origin.name(f"optimizer.params.{key}")
        if key == "max_grad_norm":
            raise ValueError(f"{place}: DeepSpeed clips by itself; set gradient_clipping")
        if key not in kinds:
            raise ValueError(f"{place}: {name} has no such setting{nearest(key, kinds)}")
        check_kind(value, kinds[key], place)


def check_schedule_section(section: Mapping[str, Any], origin: Origin) -> None:
    """Raise a one-line ValueError for an unknown type, or a setting it does not have or of the wrong kind."""
    name = str(section.get("type", ""))
    kinds = schedule_kinds(name)
    if not kinds:
        near = nearest(name, SCHEDULES)
        raise ValueError(f"{origin.name('scheduler.type')}={name!r}: unknown schedule{near}")
    for key, value in section.get("params", {}).items():
        place = origin.name(f"scheduler.params.{key}")
        if key == "last_batch_iteration":
            raise ValueError(f"{place}: a resume continues the schedule by itself; remove it")
        if key not in kinds:
            raise ValueError(f"{place}: {name} has no such setting{nearest(key, kinds)}")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ValueError(f"{place}={value!r}: must be {' or '.join(_CHOICES[key])}")
        check_kind(value, kinds[key], place)
        if value == "auto":
            continue
        numbers = value if isinstance(value, list) else [value]  # one for each parameter group
        if key in _AT_LEAST_1 and not all(number >= 1 for number in numbers):
            raise ValueError(f"{place}={value!r}: must be at least 1")
        if key in _AT_LEAST_0 and not all(number >= 0 for number in numbers):
            raise ValueError(f"{place}={value!r}: must be at least 0")
        if key in _WITHIN_0_AND_1 and (numbers is value or not 0 <= value <= 1):
            raise ValueError(f"{place}={value!r}: must be within 0 and 1")


def _optimizer_names() -> list[str]:
    own = [name for name, value in vars(torch.optim).items() if inspect.isclass(value)]
    return [*own, "Lamb", "Lion", "Muon", *CLIENT_OPTIMIZERS]


def _kinds(*owners: Any) -> dict[str, Kind]:
    """Constructors' parameters, with the kind that annotation and default show."""
    found = {}
    for owner in owners:
        for name, parameter in inspect.signature(owner).parameters.items():
            default, hint = parameter.default, inspect.formatannotation(parameter.annotation)
            if isinstance(default, bool) or "bool" in hint:
                found[name] = Kind.SWITCH
            elif isinstance(default, str) or "str" in hint:
                found[name] = Kind.TEXT
            else:
                found[name] = Kind.WHOLE if hint in ("int", "int | None") else Kind.NUMBER
    return {name: kind for name, kind in found.items() if name not in ("params", "model_params", "optimizer", "self")}
