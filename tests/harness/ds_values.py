"""Values of nested settings, such as a DeepSpeed JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dwt_ds.base.trees import set_place
from dwt_ds.config.schema import RunConfig

Resolve = Callable[..., tuple[RunConfig, dict[str, Any]]]


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from values by their dotted places."""
    settings: dict[str, Any] = {}
    for place, value in values.items():
        set_place(settings, place, value)
    return settings


def autos(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return [found for value in values.values() for found in autos(value)]
    return [values] if values == "auto" else []
