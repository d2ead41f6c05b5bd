"""Kinds of values in a DeepSpeed JSON; numbers that were written as text.

DeepSpeed itself passes most values on as they are, so that "1e-8" fails deep inside of an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from dwt_ds.base.yaml_and_json import as_number


class Kind(Enum):
    """What a value must be; the value says it in words."""

    NUMBER = "a number"
    """Or a list of numbers, such as betas."""
    WHOLE = "a whole number"
    SWITCH = "true or false"
    TEXT = "text"


KIND_OF_TYPE = {bool: Kind.SWITCH, int: Kind.WHOLE, float: Kind.NUMBER, str: Kind.TEXT}


def kind_of(value: Any) -> Kind:
    """The kind of a setting with this default."""
    return KIND_OF_TYPE.get(type(value), Kind.TEXT)


def read_number(value: Any, kind: Kind) -> Any:
    """`value` as a number where the kind wants one and it is written as text, or as 1e3 for a whole number.

    What cannot be read so is returned as it is, for `check_kind` to refuse.
    """
    if isinstance(value, list):
        return [read_number(each, kind) for each in value]
    if kind not in (Kind.NUMBER, Kind.WHOLE):
        return value
    if isinstance(value, str):
        number = as_number(value)
        value = value if number is None else number
    return int(value) if kind is Kind.WHOLE and isinstance(value, float) and value.is_integer() else value


def read_numbers(section: Any, kind_at: Callable[[str], Kind | None]) -> None:
    """`read_number` for each value of a section, in place; `kind_at` gives None for keys that it does not know."""
    for key, value in section.items() if isinstance(section, dict) else ():
        kind = kind_at(key)
        if kind is not None:
            section[key] = read_number(value, kind)


def check_kind(value: Any, kind: Kind, place: str) -> None:
    """Raise ValueError unless the value has the kind; null and "auto" have every kind."""
    if value in (None, "auto"):
        return
    is_number = kind is Kind.NUMBER
    kinds = (Kind.NUMBER, Kind.WHOLE) if is_number else (kind,)
    values = value if is_number and isinstance(value, list) else [value]
    if not all(KIND_OF_TYPE.get(type(each)) in kinds for each in values):
        raise ValueError(f"{place}={value!r}: must be {kind.value}")
