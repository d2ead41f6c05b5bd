"""A recipe's file, its bases and the command line's overrides, made into one checked RunConfig."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwt_ds.base.files import find_file
from dwt_ds.base.trees import flatten, get_place, merge, set_place
from dwt_ds.base.yaml_and_json import read_yaml
from dwt_ds.config.overrides import read_value
from dwt_ds.config.schema import RunConfig
from dwt_ds.config.validate import validated

RECIPES_FOLDER = Path(__file__).parent / "recipes"


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


def find_recipe(recipe: str) -> Path:
    """Path of a recipe given as a file or as the name of a packaged one; FileNotFoundError with the fix otherwise."""
    return find_file(recipe, {name: RECIPES_FOLDER / f"{name}.yaml" for name in recipe_names()}, "recipe")


def load_recipe(recipe: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, follow its `base`, apply `key=value` overrides, check everything.

    Raises:
        ValueError: one line (field, value, fix) for an unknown key, a wrong type or a value out of range.
        FileNotFoundError: the recipe or its base does not exist.
    """
    path = find_recipe(recipe)
    settings = _read_with_bases(path)
    written = merge({}, settings)
    for override in overrides:
        _apply_override(settings, override)
    _check_length(written, settings)
    return Recipe(name=path.stem, config=parse_run_config(settings), written=frozenset(flatten(settings)))


def parse_run_config(settings: Mapping[str, Any]) -> RunConfig:
    """Nested settings as a RunConfig; ValueError as from `validated`."""
    return validated(RunConfig, settings)


def _read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ValueError(f"base: {path} names itself through its bases; remove the loop")
    settings = read_yaml(path, "recipe")
    base = settings.pop("base", None)
    below = {} if base is None else _read_with_bases(_find_base(str(base), path), (*seen, path.resolve()))
    merged = merge(below, settings)  # copies: YAML's aliases put one object in two places
    _check_length(below, merged)
    return merged


def _check_length(below: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse a length in epochs that is laid over one in steps, which would win (ValueError)."""
    before, epochs_before = (get_place(below, f"train.{name}") for name in ("max_steps", "epochs"))
    steps, epochs = (get_place(settings, f"train.{name}") for name in ("max_steps", "epochs"))
    if steps is not None and steps == before and epochs not in (None, epochs_before):
        raise ValueError(
            f"train.epochs={epochs}: train.max_steps={steps} comes first; set train.max_steps=null as well"
        )


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
    parts = key.split(".")
    if not equals or not all(parts):
        raise ValueError(f"override {override!r}: write it as key=value, for instance train.max_steps=1000")
    try:
        value = read_value(key, text)
    except ValueError:
        raise ValueError(f"override {override!r}: the value is not valid YAML; quote it") from None
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        child = get_place(settings, name)
        if child is None:
            set_place(settings, name, {})
        elif not isinstance(child, dict):
            if name not in ("distill.soft_weight", "distill.temperature"):
                raise ValueError(f"override {override!r}: {name} is {child!r}, not a section")
            set_place(settings, name, {"start": child})
    if isinstance(value, dict) and isinstance(settings.get(key), dict):
        value = merge(settings[key], value)  # a section over the recipe's, as a recipe's is over its base's
    set_place(settings, key, value)
