"""Settings that came as plain values, checked against a pydantic dataclass; an error is one line."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from dwt_ds.base.words import nearest

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
"""For every dataclass of settings: no unknown keys, a description of every field, finite numbers."""

T = TypeVar("T")

# What a value must be, by pydantic's type of error; its own words name Python's types and the branches of unions.
_MUST_BE = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dataclass_type": "a mapping of settings",
    "dict_type": "a mapping of settings",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "missing": "a longer list",
    "string_type": "text, in quotes if it looks like a number",
    "too_long": "a list of {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}


def validated(owner: type[T], values: Any, name: str = "") -> T:
    """`values` as an instance of the pydantic dataclass `owner`.

    Args:
        owner: a dataclass, whose fields may be dataclasses.
        values: a nested mapping of its fields.
        name: dotted, put before the fields' names in errors.

    Raises:
        ValueError: one line (field, value, fix) for the first unknown key, wrong type or value out of range.
    """
    _reject_unknown_keys(values, owner, name, owner)
    try:
        return TypeAdapter(owner).validate_python(values)
    except ValidationError as error:
        raise ValueError(_one_line(error, owner, name)) from None


def must_be(error: ErrorDetails) -> str:
    """What a value that pydantic refused must be, to follow "must be "."""
    if error["type"] == "enum":  # an enum with aliases is listed with them
        return f"one of {', '.join(dict.fromkeys(re.split(', | or ', error['ctx']['expected'])))}"
    template = _MUST_BE.get(error["type"])
    if template is None:
        return f"something else ({own_message(error)})"
    limits = {name: f"{at:g}" if isinstance(at, float) else at for name, at in error.get("ctx", {}).items()}
    return template.format(**limits)


def own_message(error: ErrorDetails) -> str:
    """The message of a ValueError that one of our classes raised; pydantic's own for the others."""
    return error["msg"].removeprefix("Value error, ")


def _reject_unknown_keys(values: Any, owner: type, name: str, root: type) -> None:
    if not isinstance(values, Mapping):
        return
    hints = typing.get_type_hints(owner)
    names = [each.name for each in fields(owner)]
    for key, value in values.items():
        place = _dotted(name, key)
        if key not in names:
            raise ValueError(f"{place}: unknown key{_nearest(str(key), names, root)}")
        if isinstance(value, bool) and {int, float} & {hints[key], *typing.get_args(hints[key])}:
            raise ValueError(f"{place}={value}: must be a number")  # pydantic takes true for 1
        inner = dataclass_in(hints[key])
        if inner is not None:
            _reject_unknown_keys(value, inner, place, root)


def _nearest(key: str, names: list[str], root: type) -> str:
    """The nearest name to an unknown key: the same elsewhere in the tree, one beside it, or the nearest elsewhere."""
    everywhere = _places(root)
    if key in everywhere:
        section, _, last = key.rpartition(".")
        return f"; in a file, write {last} under {section}"
    elsewhere = [place for place in everywhere if place.rpartition(".")[2] == key]
    if elsewhere:
        return f"; did you mean {' or '.join(map(repr, elsewhere))}?"
    return nearest(key, names) or nearest(key, everywhere)


def _places(owner: type, name: str = "") -> list[str]:
    """Dotted names of all fields of nested dataclasses."""
    hints, found = typing.get_type_hints(owner), []
    for each in fields(owner):
        inner = dataclass_in(hints[each.name])
        place = _dotted(name, each.name)
        found += [place] if inner is None else [place, *_places(inner, place)]
    return found


def dataclass_in(hint: Any) -> type | None:
    """The dataclass of settings that a field takes, or a list of it, by its declared type; None if it takes none."""
    options = (*options_of(hint), *typing.get_args(hint))
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _values_of_mapping(hint: Any) -> Any:
    """The type of the values, where a field takes a mapping of the user's own keys, and nothing else but null."""
    options = [option for option in options_of(hint) if option is not types.NoneType]
    return typing.get_args(options[0])[1] if [typing.get_origin(option) for option in options] == [dict] else None


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types that a field takes, by its declared type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _one_line(error: ValidationError, owner: type, name: str) -> str:
    errors = error.errors()
    first = errors[0]
    place = _place(first, owner, name)
    if first["type"] == "value_error":
        # Raised by our own classes, whose message begins with the field's name, or by a field's own check.
        message = own_message(first)
        return f"{place}{message}" if message.startswith("=") else _dotted(place, message)
    if first["type"] == "missing" and isinstance(first["loc"][-1], str):
        return f"{place}: missing"
    # A value that fits no branch of a union has an error for each branch. Another field may have the same value.
    same = [each for each in errors if each["input"] is first["input"] and _place(each, owner, name) == place]
    return f"{place}={first['input']!r}: must be {' or '.join(dict.fromkeys(map(must_be, same)))}"


def _place(error: ErrorDetails, owner: type, name: str) -> str:
    """Dotted name of the field or of a mapping's key, without what pydantic adds: positions in a list, branches of a
    union, validators."""
    hint: Any = owner
    for part in error["loc"]:
        inner = dataclass_in(hint)
        hints = {} if inner is None else typing.get_type_hints(inner)
        if part in hints:
            name, hint = _dotted(name, part), hints[str(part)]
        elif part != "[key]" and (values := _values_of_mapping(hint)) is not None:
            name, hint = _dotted(name, part), values
    return name


def _dotted(*names: object) -> str:
    return ".".join(str(name) for name in names if name != "")
