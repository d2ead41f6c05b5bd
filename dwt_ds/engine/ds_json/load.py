"""One DeepSpeed configuration out of a JSON file, overrides and the recipe.

As Hugging Face users expect, "auto" in the JSON means that the recipe decides. Where both decide, they must agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dwt_ds
from dwt_ds.base.words import nearest
from dwt_ds.engine.ds_json.keys import check_ds_keys
from dwt_ds.engine.ds_json.origin import Origin, lay_over
from dwt_ds.engine.ds_json.types import drop_settings_of_another_type


@dataclass(frozen=True)
class DeepSpeedJson:
    """A DeepSpeed JSON as the user wrote it, overrides applied, keys checked; `origin` names its places in messages."""

    origin: Origin
    values: dict[str, Any]

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.values.get("zero_optimization", {}).get("stage", 0))

    @property
    def precision(self) -> str:
        """`bf16`, `fp16` or `fp32`: the dtype of the student's weights in the forward pass."""
        for name, sections in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",))):
            if any(self.values.get(section, {}).get("enabled") for section in sections):
                return name
        return "fp32"


def packaged_ds_configs() -> dict[str, Path]:
    """Name -> path of the JSON files that come with the project."""
    package = Path(dwt_ds.__file__).parent
    folders = (package / "ds_configs", package.parent / "ds_configs")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def load_ds_json(name_or_path: str, overrides: Mapping[str, Any]) -> DeepSpeedJson:
    """Read a JSON by path or packaged name and lay the nested `overrides` over it.

    Raises FileNotFoundError or a one-line ValueError for a file that is missing, is not JSON, or has an unknown key;
    what the overrides wrote is named as `deepspeed.key`.
    """
    packaged = packaged_ds_configs()
    path = Path(name_or_path)
    if not path.is_file():
        if name_or_path not in packaged:
            raise FileNotFoundError(
                f"deepspeed_config={name_or_path!r}: no such file and no packaged JSON of that name"
                f"{nearest(name_or_path, packaged)} (packaged: {', '.join(sorted(packaged))})"
            )
        path = packaged[name_or_path]
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name}: not valid JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: holds {type(values).__name__}; a DeepSpeed JSON is an object in braces")
    drop_settings_of_another_type(values, overrides)
    lay_over(values, overrides, path.name)
    check_ds_keys(values, path.name, overrides)
    origin = Origin(path.name, overrides)
    _decide_precision(values, origin)
    _keep_the_gradient_check(values, origin)
    return DeepSpeedJson(origin, values)


def _decide_precision(values: dict[str, Any], origin: Origin) -> None:
    """Files written for Hugging Face leave both precisions on "auto"; that is bf16 here."""
    bf16, fp16 = values.get("bf16", {}), values.get("fp16", {})
    if fp16.get("enabled") == "auto":
        fp16["enabled"] = False
    if bf16.get("enabled") == "auto":
        bf16["enabled"] = not fp16.get("enabled")
    if bf16.get("enabled") and fp16.get("enabled"):
        second = origin.name("fp16.enabled").removeprefix(f"{origin.source}: ")
        raise ValueError(f"{origin.name('bf16.enabled')} and {second} are both on; switch one off")


def _keep_the_gradient_check(values: dict[str, Any], origin: Origin) -> None:
    """Steps that must not be taken are marked by a NaN in the gradient (guard.py); these keys would let it through."""
    for section, key in (
        ("bf16", "check_grad_overflow"),
        ("bfloat16", "check_grad_overflow"),
        ("zero_optimization", "compute_grad_norm"),
    ):
        if values.get(section, {}).get(key) is False:
            place = origin.name(f"{section}.{key}")
            raise ValueError(f"{place}=false: bad steps would reach the optimizer; remove it")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} stands twice in one section; remove one")
    return dict(pairs)
