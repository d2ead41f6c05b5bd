"""Places in a DeepSpeed JSON, and whether the file or the recipe's `deepspeed` section (the overrides) wrote a value.

A place is a dotted name, such as `optimizer.params.lr`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dwt_ds.base.trees import NOT_SET, get_place


@dataclass(frozen=True)
class Origin:
    """Names places in messages as the user wrote them."""

    source: str
    """Name of the file."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Nested as the JSON."""

    def overridden(self, place: str) -> bool:
        """Whether the overrides have a value there."""
        return get_place(self.overrides, place, NOT_SET) is not NOT_SET

    def name(self, place: str) -> str:
        """`my.json: optimizer.params.lr`, or `deepspeed.optimizer.params.lr`, to begin a message."""
        return f"deepspeed.{place}" if self.overridden(place) else f"{self.source}: {place}"

    def assignment(self, place: str, value: Any) -> str:
        """`optimizer.params.lr=0.002 (my.json)`, or `deepspeed.optimizer.params.lr=0.002`, within a message."""
        return f"deepspeed.{place}={value}" if self.overridden(place) else f"{place}={value} ({self.source})"

    def leave_to_recipe(self, place: str) -> str:
        """How to let the recipe decide there."""
        return f"remove deepspeed.{place}" if self.overridden(place) else 'set the one in the JSON to "auto"'


def lay_over(values: dict[str, Any], overrides: Mapping[str, Any], source: str, above: str = "") -> None:
    """Write the nested `overrides` into `values`, the contents of the file `source` at the place `above`.

    Raises ValueError for an override inside a value that is not a section.
    """
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            below = values.setdefault(key, {})
            if not isinstance(below, dict):
                raise ValueError(f"deepspeed.{above}{key}: {source} has {below!r} there, not a section")
            lay_over(below, value, source, f"{above}{key}.")
        else:
            values[key] = value
