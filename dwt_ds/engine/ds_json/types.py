"""The settings of the optimizers and learning-rate schedules that a DeepSpeed JSON names by `type`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import lr_schedules

from dwt_ds.base.words import nearest
from dwt_ds.engine.ds_json.origin import Origin
from dwt_ds.engine.optimizers import CLIENT_OPTIMIZERS

_ONE_BIT = frozenset({"onebitadam", "onebitlamb", "zerooneadam"})

# What DeepSpeed reads out of an Adam's params before it constructs one of three classes.
_ADAM_EXTRAS = frozenset({"adam_w_mode", "torch_adam", "fp32_optimizer_states", "foreach"})
_MUON = frozenset({"lr", "muon_lr", "momentum", "ns_method", "adam_lr", "betas", "eps", "weight_decay"})
# Newer than the oldest DeepSpeed that is supported.
_PER_HEAD_MUON = frozenset({"per_head_muon"} if hasattr(deepspeed, "resolve_per_head_muon_after_sharding") else ())

_WARMUP_TYPES = (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)
_SCHEDULE_SWITCHES = frozenset({"cycle_momentum", "lr_range_test_staircase"})


def optimizer_settings(name: str) -> set[str]:
    """Names that `optimizer.params` may hold beside this type; empty for an unknown one."""
    if name in CLIENT_OPTIMIZERS:
        return set(CLIENT_OPTIMIZERS[name])
    from deepspeed.ops import adagrad, adam, lamb, lion

    adams = (adam.FusedAdam, adam.DeepSpeedCPUAdam, torch.optim.Adam, torch.optim.AdamW)
    adam_settings = _parameters(*adams) - {"adamw_mode"} | _ADAM_EXTRAS
    deepspeeds = {  # DeepSpeed takes their names in upper and lower case
        "adam": adam_settings,
        "adamw": adam_settings,
        "adagrad": _parameters(adagrad.DeepSpeedCPUAdagrad, torch.optim.Adagrad),
        "lamb": _parameters(lamb.FusedLamb),
        "lion": _parameters(lion.FusedLion, lion.DeepSpeedCPULion),
        "muon": _MUON | _PER_HEAD_MUON | _ADAM_EXTRAS,
    }
    if name.lower() in deepspeeds:
        return set(deepspeeds[name.lower()])
    torch_class = getattr(torch.optim, name, None)
    return _parameters(torch_class) if inspect.isclass(torch_class) else set()


def schedule_settings(name: str) -> set[str]:
    """Names that `scheduler.params` may hold beside this type; empty for an unknown one."""
    return _parameters(getattr(lr_schedules, name)) if name in lr_schedules.VALID_LR_SCHEDULES else set()


def schedule_needs(name: str) -> list[str]:
    """Those of a known schedule's settings that have no default."""
    parameters = inspect.signature(getattr(lr_schedules, name)).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.name != "optimizer"]


def drop_settings_of_another_type(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Take out of a file what the optimizer and the scheduler do not have, as far as it was written for others.

    That is every setting if `overrides`, which are to be laid over the file, name another type; else those that are
    "auto", since files are often written for AdamW first. What the overrides set stays theirs, to be checked.
    """
    for section, settings_of in (("optimizer", optimizer_settings), ("scheduler", schedule_settings)):
        written = values.get(section)
        if not isinstance(written, dict) or not isinstance(written.get("params"), dict):
            continue
        over = overrides.get(section)
        chosen = over.get("type", written.get("type")) if isinstance(over, Mapping) else written.get("type")
        another = chosen != written.get("type")
        known = settings_of(str(chosen))
        if known:
            written["params"] = {
                key: value
                for key, value in written["params"].items()
                if key in known or not (another or value == "auto")
            }


def check_optimizer_section(section: Mapping[str, Any], origin: Origin) -> None:
    """Whether the type is known and has the settings beside it (ValueError, one line)."""
    name = str(section.get("type", ""))
    said = f"{origin.name('optimizer.type')}={name!r}"
    if name.lower() in _ONE_BIT:
        instead = "Lamb" if "lamb" in name.lower() else "AdamW"
        raise ValueError(f"{said}: DeepSpeed took its 1-bit optimizers out in 2026; use {instead}")
    known = optimizer_settings(name)
    if not known:
        raise ValueError(f"{said}: unknown optimizer{nearest(name, _optimizer_names())}")
    for key in section.get("params", {}):
        place = origin.name(f"optimizer.params.{key}")
        if key == "max_grad_norm":
            raise ValueError(f"{place}: DeepSpeed clips by itself; set gradient_clipping")
        if key not in known:
            raise ValueError(f"{place}: {name} has no such setting{nearest(key, known)}")


def check_schedule_section(section: Mapping[str, Any], origin: Origin) -> None:
    """Whether the type is known and has the settings beside it, of the right kinds (ValueError, one line)."""
    name = str(section.get("type", ""))
    known = schedule_settings(name)
    if not known:
        near = nearest(name, lr_schedules.VALID_LR_SCHEDULES)
        raise ValueError(f"{origin.name('scheduler.type')}={name!r}: unknown schedule{near}")
    for key, value in section.get("params", {}).items():
        place = origin.name(f"scheduler.params.{key}")
        if key not in known:
            raise ValueError(f"{place}: {name} has no such setting{nearest(key, known)}")
        if key == "warmup_type" and value not in _WARMUP_TYPES:  # DeepSpeed would take log
            raise ValueError(f"{place}={value!r}: must be {' or '.join(_WARMUP_TYPES)}")
        if key != "warmup_type" and isinstance(value, str) and value != "auto":
            kind = "true or false" if key in _SCHEDULE_SWITCHES else "a number"
            raise ValueError(f"{place}={value!r}: must be {kind}")


def _optimizer_names() -> list[str]:
    own = [name for name, value in vars(torch.optim).items() if inspect.isclass(value)]
    return [*own, "Lamb", "Lion", "Muon", *CLIENT_OPTIMIZERS]


def _parameters(*owners: Any) -> set[str]:
    names = {name for owner in owners for name in inspect.signature(owner).parameters}
    return names - {"params", "model_params", "optimizer", "self"}
