"""Overrides, `key=value`: what a field declares as text is taken as written, everything else is YAML."""

from __future__ import annotations

import typing
from typing import Any, Literal

import yaml

from dwt_ds.base.yaml_and_json import parse_yaml
from dwt_ds.config.schema import RunConfig
from dwt_ds.config.validate import dataclass_in, options_of


def override_of(key: str, text: str) -> str:
    """The override that gives a field of text exactly `text`, quoted where it would be read as something else."""
    plain = text != "" and not _is_null(text) and _in_quotes(text) is None
    return f"{key}={text}" if plain else f"{key}='{text.replace(chr(39), 2 * chr(39))}'"


def read_value(key: str, text: str) -> Any:
    """The value that an override gives to a field of RunConfig.

    A field of text gets `text` as it is (`exp #2`, `2024`, `true`, `[a]: b`), with two exceptions: `null` or nothing is
    null for a field that may be null, and text wholly in quotes is what is in the quotes. A field that takes text or a
    mapping gets a mapping where the text is one. What is not declared, such as a key of the DeepSpeed JSON, gets `text`
    as it is where YAML makes text of it.

    Args:
        key: dotted name of the field.
        text: what follows the equals sign.

    Raises:
        ValueError: it had to be YAML, and is not.
    """
    options = options_of(_hint(key.split(".")))
    texts = [option for option in options if _is_text(option)]
    others = [option for option in options if not _is_text(option) and option is not type(None)]
    if not texts or not all(typing.get_origin(option) is dict for option in others):
        value = parse_yaml(text)
        return text if isinstance(value, str) and _in_quotes(text) is None else value
    if type(None) in options and (text == "" or _is_null(text)):
        return None
    quoted = _in_quotes(text)
    if quoted is not None:
        return quoted
    if others and text.startswith("{"):
        return parse_yaml(text)
    return text


def _hint(parts: list[str]) -> Any:
    """The declared type of a field; Any for what is not declared, such as a key of the DeepSpeed JSON."""
    hint: Any = RunConfig
    for part in parts:
        owner = dataclass_in(hint)
        if owner is not None:
            hint = typing.get_type_hints(owner).get(part, Any)
        else:
            options = options_of(hint)
            values = [typing.get_args(option)[1:] for option in options if typing.get_origin(option) is dict]
            hint = values[0][0] if values and values[0] else Any
    return hint


def _is_text(hint: Any) -> bool:
    of_words = typing.get_origin(hint) is Literal and all(isinstance(word, str) for word in typing.get_args(hint))
    return hint is str or of_words


def _is_null(text: str) -> bool:
    return text in ("null", "Null", "NULL", "~")


def _in_quotes(text: str) -> str | None:
    """What is in the quotes, if the whole text is one quoted word of YAML."""
    if text[:1] not in ("'", '"'):
        return None
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text):
        return str(node.value)
    return None
