"""From a recipe's name and the command line's overrides to a checked RunConfig."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from dwt_ds.base.trees import flatten, merge
from dwt_ds.base.words import nearest
from dwt_ds.config.schema import RunConfig

RECIPES_FOLDER = Path(__file__).parent / "recipes"

# What a value must be, by pydantic's type of error; its own words name Python's types and the branches of unions.
_MUST_BE = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dataclass_type": "a mapping of settings",
    "dict_type": "a mapping of settings",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "missing": "a longer list",
    "string_type": "text, in quotes if it looks like a number",
    "too_long": "a list of {max_length}",
    "tuple_type": "a list",
}


class _YamlLoader(yaml.SafeLoader):
    """Reads 5e-4 as a number and refuses a key that stands twice, as YAML 1.2 does; PyYAML follows YAML 1.1."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"{twice!r} stands twice in the section", problem_mark=node.start_mark)
        return node


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe."""

    name: str
    config: RunConfig
    written: frozenset[str]
    """Dotted names of the settings that the recipe, its bases or an override wrote; the rest are defaults."""


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def must_be(error: ErrorDetails) -> str:
    """What a value that pydantic refused must be, to follow "must be "."""
    if error["type"] == "enum":  # an enum with aliases is listed with them
        return f"one of {', '.join(dict.fromkeys(re.split(', | or ', error['ctx']['expected'])))}"
    template = _MUST_BE.get(error["type"])
    if template is None:
        return f"something else ({error['msg'].removeprefix('Value error, ')})"
    return template.format(**error.get("ctx", {}))


def find_recipe(recipe: str) -> Path:
    """Path of a recipe given as a file or as the name of a packaged one; FileNotFoundError with the fix otherwise."""
    if Path(recipe).is_file():
        return Path(recipe)
    packaged = RECIPES_FOLDER / f"{recipe}.yaml"
    if packaged.is_file():
        return packaged
    raise FileNotFoundError(
        f"recipe {recipe!r}: no such file and no packaged recipe of that name{nearest(recipe, recipe_names())} "
        f"(packaged: {', '.join(recipe_names())})"
    )


def load_recipe(recipe: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, follow its `base`, apply `key=value` overrides, check everything.

    Raises ValueError (one line: field, value, fix) for an unknown key, a wrong type or a value out of range, and
    FileNotFoundError for a recipe that is not there.
    """
    path = find_recipe(recipe)
    settings = _read_with_bases(path)
    for override in overrides:
        _apply_override(settings, override)
    config = parse_run_config(settings)
    return Recipe(name=path.stem, config=config, written=frozenset(flatten(settings)))


def parse_run_config(settings: Mapping[str, Any]) -> RunConfig:
    """Check a nested dict against the dataclass tree; one-line ValueError for the first thing that is wrong."""
    _reject_unknown_keys(settings, RunConfig, "")
    try:
        return TypeAdapter(RunConfig).validate_python(settings)
    except ValidationError as error:
        raise ValueError(_one_line(error)) from None


def _read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ValueError(f"base: {path} names itself through its bases; remove the loop")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {path}: holds {type(settings).__name__}, not a mapping of settings")
    base = settings.pop("base", None)
    below = {} if base is None else _read_with_bases(_find_base(str(base), path), (*seen, path.resolve()))
    return merge(below, settings)  # copies: YAML's aliases put one object in two places


def _find_base(base: str, child: Path) -> Path:
    """Beside the recipe that names it, else as any recipe is found."""
    for sibling in (child.parent / base, child.parent / f"{base}.yaml"):
        if sibling.is_file():
            return sibling
    try:
        return find_recipe(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"base of {child}: {error}") from None


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: write it as key=value, for instance train.max_steps=1000")
    try:
        value = yaml.load(text, _YamlLoader) if text else None
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: the value is not valid YAML; quote it") from None
    *parents, last = key.split(".")
    place = settings
    for depth, parent in enumerate(parents):
        child = place.setdefault(parent, {})
        if not isinstance(child, dict):
            name = ".".join(parents[: depth + 1])
            if name not in ("distill.soft_weight", "distill.temperature"):
                raise ValueError(f"override {override!r}: {name} is {child!r}, which has no parts")
            child = place[parent] = {"start": child}
        place = child
    place[last] = value


def _reject_unknown_keys(settings: Mapping[str, Any], owner: type, prefix: str) -> None:
    hints = typing.get_type_hints(owner)
    names = [f.name for f in fields(owner)]
    for key, value in settings.items():
        if key not in names:
            raise ValueError(f"{prefix}{key}: unknown key{nearest(str(key), names)}")
        if isinstance(value, bool) and {int, float} & {hints[key], *typing.get_args(hints[key])}:
            raise ValueError(f"{prefix}{key}={value}: must be a number")  # pydantic takes true for 1
        inner = _dataclass_in(hints[key])
        if inner is not None and isinstance(value, Mapping):
            _reject_unknown_keys(value, inner, f"{prefix}{key}.")


def _dataclass_in(hint: Any) -> type | None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _one_line(error: ValidationError) -> str:
    errors = error.errors()
    first, where = errors[0], _field_at(errors[0]["loc"])
    if first["type"] == "value_error":
        # Our own classes' words, which begin with the field's name.
        return f"{where}.{first['msg'].removeprefix('Value error, ')}"
    # A value that fits no branch of a union has an error for each.
    needs = [must_be(each) for each in errors if _field_at(each["loc"]) == where]
    return f"{where}={first['input']!r}: must be {' or '.join(dict.fromkeys(needs))}"


def _field_at(location: Iterable[str | int]) -> str:
    """Dotted name of the field, without what pydantic adds: positions in a list, branches of a union, validators."""
    names: list[str] = []
    owner: type | None = RunConfig
    for part in location:
        hints = typing.get_type_hints(owner) if owner is not None else {}
        if part in hints:
            names.append(str(part))
            owner = _dataclass_in(hints[str(part)])
    return ".".join(names)
