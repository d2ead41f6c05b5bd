"""Reading a DeepSpeed JSON: the file, the recipe's overrides of it, checked keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dwt_ds
from dwt_ds.base.files import find_file
from dwt_ds.base.trees import get_place, set_place
from dwt_ds.base.yaml_and_json import parse_json
from dwt_ds.config.schema import expand_path
from dwt_ds.engine.ds_json.combinations import compute_precision, precision, zero_stage
from dwt_ds.engine.ds_json.keys import check_ds_keys, read_all_numbers
from dwt_ds.engine.ds_json.optimizer_and_schedule import drop_null_settings, drop_settings_of_another_type
from dwt_ds.engine.ds_json.origin import Origin, lay_over

_PATHS = (
    "csv_monitor.output_path",
    "tensorboard.output_path",
    "flops_profiler.output_file",
    "zero_optimization.offload_param.nvme_path",
)


@dataclass(frozen=True)
class DeepSpeedJson:
    """A DeepSpeed JSON as the user wrote it, overrides applied, keys checked; `origin` names its places in messages."""

    origin: Origin
    values: dict[str, Any]

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return zero_stage(self.values)

    @property
    def precision(self) -> str:
        """`bf16`, `fp16` or `fp32`: the dtype of the student's weights in the forward pass."""
        return precision(self.values)

    @property
    def compute_precision(self) -> str:
        """The dtype of most products: with `torch_autocast` a lower one than that of the weights."""
        return compute_precision(self.values)


def packaged_ds_configs() -> dict[str, Path]:
    """Name -> path of the JSON files that come with the project."""
    package = Path(dwt_ds.__file__).parent
    folders = (package / "ds_configs", package.parent / "ds_configs")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def load_ds_json(name_or_path: str, overrides: Mapping[str, Any]) -> DeepSpeedJson:
    """Read a JSON by path or packaged name and apply the nested `overrides`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one line, for a file that is not JSON or has an unknown key; a key from the overrides is named
            `deepspeed.key`.
    """
    path = find_file(name_or_path, packaged_ds_configs(), "deepspeed_config")
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: cannot be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: holds {type(values).__name__}; a DeepSpeed JSON is an object in braces")
    overrides = _with_one_name(dict(overrides), "deepspeed.bfloat16")
    values = _with_one_name(values, f"{path.name}: bfloat16")
    drop_settings_of_another_type(values, overrides)
    lay_over(values, overrides, path.name)
    drop_null_settings(values)
    read_all_numbers(values)
    origin = Origin(path.name, overrides)
    check_ds_keys(values, origin)
    _expand_paths(values, origin)
    _decide_precision(values, origin)
    return DeepSpeedJson(origin, values)


def _with_one_name(values: dict[str, Any], said: str) -> dict[str, Any]:
    """The same, with the section `bfloat16`, which is DeepSpeed's other name for it, as `bf16`."""
    if "bfloat16" not in values:
        return values
    if "bf16" in values:
        raise ValueError(f"{said}: another name of the section bf16, which is also there; keep one of the two")
    return {"bf16" if key == "bfloat16" else key: value for key, value in values.items()}


def _expand_paths(values: dict[str, Any], origin: Origin) -> None:
    """Read `~` and ${NAME} as the recipe's paths have them; DeepSpeed would make folders of such names."""
    for place in _PATHS:
        text = get_place(values, place)
        if text and isinstance(text, str):
            try:
                set_place(values, place, os.path.expanduser(expand_path(text)))
            except ValueError as error:
                raise ValueError(f"{origin.name(place)}{error}") from None


def _decide_precision(values: dict[str, Any], origin: Origin) -> None:
    """In files written for Hugging Face, both precisions are "auto"; that is bf16 here."""
    bf16, fp16 = values.get("bf16", {}), values.get("fp16", {})
    if fp16.get("enabled") == "auto":
        fp16["enabled"] = False
    if bf16.get("enabled") == "auto":
        bf16["enabled"] = not fp16.get("enabled")
    if bf16.get("enabled") and fp16.get("enabled"):
        second = origin.name("fp16.enabled").removeprefix(f"{origin.source}: ")
        raise ValueError(f"{origin.name('bf16.enabled')} and {second} are both on; switch one off")
