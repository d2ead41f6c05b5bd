"""Recipe and DeepSpeed JSON made to agree, as the tests of both ask for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.ds_values import Resolve

from dwt_ds.config.recipe import Recipe, load_recipe
from dwt_ds.config.schema import RunConfig
from dwt_ds.engine.ds_json.load import load_ds_json
from dwt_ds.engine.ds_json.resolve import resolve_batch, resolve_schedule


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe that writes down nothing but its overrides."""

    def load(*overrides: str) -> Recipe:
        path = tmp_path / "mine.yaml"
        path.write_text("{}\n", encoding="utf-8")
        return load_recipe(str(path), overrides)

    return load


@pytest.fixture
def resolve(tmp_path: Path, recipe: Callable[..., Recipe]) -> Resolve:
    """Recipe (by its overrides) and JSON made to agree, for two ranks and 100 steps unless told otherwise."""

    def settle(
        ds: Any, *overrides: str, world_size: int = 2, total_steps: int = 100
    ) -> tuple[RunConfig, dict[str, Any]]:
        loaded = recipe(*overrides)
        path = tmp_path / "my.json"
        path.write_text(ds if isinstance(ds, str) else json.dumps(ds), encoding="utf-8")
        ds_json = load_ds_json(str(path), loaded.config.deepspeed)
        config, values = resolve_batch(loaded, ds_json, world_size)
        return config, resolve_schedule(values, loaded, config, total_steps, ds_json.origin)

    return settle
