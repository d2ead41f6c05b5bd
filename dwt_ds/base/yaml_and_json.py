"""YAML and JSON as people write them: the one reader of recipes, overrides, grids, task files and DeepSpeed JSONs.

YAML here is YAML 1.2 where PyYAML is 1.1 and surprises: 2.5e8 and 1.0e0 are numbers, 010 is ten, 1:30 and dates are
text, and a key is the text that stands there, also `on` or `no`. As values, yes, no, on and off remain true and false.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|"
    r"\.(nan|NaN|NAN)",
}
_PLAIN = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null")
_BASES = {"0x": 16, "0o": 8, "0b": 2}


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; ValueError of one line for a duplicate key, a value within itself, bad YAML."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def yaml_text(values: Mapping[str, Any]) -> str:
    """YAML that `parse_yaml` reads as `values`, in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


def json_text(values: Any) -> str:
    """JSON as this program writes it."""
    return json.dumps(values, indent=2) + "\n"


def is_dump(content: bytes, *, is_json: bool = False) -> bool:
    """Whether a file's content is YAML, or JSON, in the very form in which this program writes it, or once did."""
    try:
        text = content.decode()
        if is_json:
            return text == json_text(parse_json(text))
        return text in (yaml_text(parse_yaml(text)), yaml.safe_dump(yaml.safe_load(text), sort_keys=False))
    except (ValueError, TypeError, yaml.YAMLError):
        return False


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError of one line for a duplicate key, NaN and infinities, bad JSON."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    """The mapping in a YAML file; `kind` says what the file is, for errors.

    Raises ValueError, in one line, if it cannot be read, is not YAML, or holds something else.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{kind} {path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{kind} {path}: holds {type(content).__name__}, not a mapping of settings")
    return content


def as_number(text: str) -> int | float | None:
    """The number that a text such as "1e-8" or "64" writes; None if it writes none. Finite, without underscores."""
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    return float(text) if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text) else None


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML is 1.1, as said at the top of this file."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open_anchors: list[str] = []

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if self.check_event(yaml.AliasEvent) and event.anchor in self._open_anchors:
            said = f"*{event.anchor} stands within &{event.anchor}"
            raise yaml.MarkedYAMLError(problem=said, problem_mark=event.start_mark)
        self._open_anchors.append(event.anchor)
        node = super().compose_node(parent, index)
        self._open_anchors.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value]
        duplicate = next((name for name in names if names.count(name) > 1), None)
        if duplicate is not None:
            raise yaml.MarkedYAMLError(problem=f"duplicate key {duplicate!r}", problem_mark=node.start_mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="expected a mapping", problem_mark=node.start_mark)
        self.flatten_mapping(node)  # what `<<` names
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_whole_number(self, node: Any) -> int:
        text = node.value.replace("_", "")
        return int(text, _BASES.get(text[:2].lower(), 10))


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that the loader would take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _tag, _pattern in _NUMBERS.items():
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list("-+.0123456789"))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is a duplicate key; remove one")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON; write a finite one")
