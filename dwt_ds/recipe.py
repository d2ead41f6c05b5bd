"""From a recipe's name and the command line's overrides to a checked RunConfig."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from dwt_ds.config import RunConfig

RECIPES_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe: the settings, and which of them somebody wrote down (the rest are defaults)."""

    name: str
    config: RunConfig
    written: frozenset[str]


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no candidate looks alike."""
    matches = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


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
    return Recipe(name=path.stem, config=config, written=frozenset(_dotted_keys(settings)))


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
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {path}: holds {type(settings).__name__}, not a mapping of settings")
    base = settings.pop("base", None)
    if base is None:
        return settings
    sibling = path.parent / f"{base}.yaml"
    base_path = sibling if sibling.is_file() else find_recipe(str(base))
    return _merged(_read_with_bases(base_path, (*seen, path.resolve())), settings)


def _merged(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: write it as key=value, for instance train.max_steps=1000")
    try:
        value = yaml.safe_load(text) if text else None
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
        inner = _dataclass_in(hints[key])
        if inner is not None and isinstance(value, Mapping):
            _reject_unknown_keys(value, inner, f"{prefix}{key}.")


def _dataclass_in(hint: Any) -> type | None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _dotted_keys(settings: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted_keys(value, f"{prefix}{key}.")


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and "[" not in part)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}={first['input']!r}: {message[0].lower()}{message[1:]}"
