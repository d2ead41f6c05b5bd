"""What differs between two nested settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line a setting, `train.learning_rate: 0.001 -> 0.0005`, in the order of `now`."""
    old, new = _flat(before), _flat(now)
    names = [*new, *(name for name in old if name not in new)]
    return [f"{name}: {_shown(old, name)} -> {_shown(new, name)}" for name in names if old.get(name) != new.get(name)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return str(flat[name]) if name in flat else "(not set)"
