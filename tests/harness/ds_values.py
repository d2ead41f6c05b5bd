"""Values of a DeepSpeed JSON."""

from __future__ import annotations

from typing import Any


def autos(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return [found for value in values.values() for found in autos(value)]
    return [values] if values == "auto" else []
