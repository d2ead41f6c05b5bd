"""Nested settings: values by their dotted names, one tree merged over another, and the differences of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class _NotSet:
    def __repr__(self) -> str:
        return "(not set)"


NOT_SET = _NotSet()


class Difference(NamedTuple):
    """A setting that two trees do not share."""

    name: str
    """Dotted, as `flatten` gives it."""
    before: Any
    """NOT_SET where the first tree lacks it."""
    now: Any
    """NOT_SET where the second tree lacks it."""


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of every leaf, in order, for instance `train.learning_rate` or `sources[0].path`.

    Leaves are all values but mappings and lists of mappings; an empty mapping is a leaf.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}.{name}": leaf for name, leaf in flatten(value).items()}
        elif isinstance(value, (list, tuple)) and value and all(isinstance(each, Mapping) for each in value):
            flat |= flatten({f"{key}[{index}]": each for index, each in enumerate(value)})
        else:
            flat[str(key)] = value
    return flat


def is_within(place: str, section: str) -> bool:
    """Whether a dotted name is `section`, or a name below it."""
    return f"{place}.".startswith(f"{section}.")


def get_place(tree: Any, place: str, missing: Any = None) -> Any:
    """The value at a dotted name, such as `optimizer.params.lr`; `missing` where there is none."""
    for part in place.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return missing
        tree = tree[part]
    return tree


def set_place(tree: dict[str, Any], place: str, value: Any) -> None:
    """Set the value at a dotted name, and create the sections around it."""
    *parents, last = place.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, nested mappings key by key; shares no mapping with either."""
    merged = {key: merge({}, value) if isinstance(value, Mapping) else value for key, value in below.items()}
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under if isinstance(under, dict) else {}, value) if isinstance(value, Mapping) else value
    return merged


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Every leaf in which the trees differ, in the order of `now`. None and a leaf that is not set are equal."""
    old, new = flatten(before), flatten(now)
    names = [*new, *(name for name in old if name not in new)]
    return [
        Difference(name, old.get(name, NOT_SET), new.get(name, NOT_SET))
        for name in names
        if old.get(name) != new.get(name)
    ]
