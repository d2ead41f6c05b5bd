"""Real ranks that measure themselves, for holding plans against."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.ranks import Train
from harness.runs import completed

Measure = Callable[..., list[dict[str, Any]]]
WORKER = Path(__file__).parents[2] / "benchmarks" / "measured_run.py"


@pytest.fixture(scope="session")
def measure(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """`measure(ranks, recipe, *overrides)` trains on so many gloo ranks and returns each rank's figures."""

    def run(ranks: int, recipe: str, *overrides: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("measured")
        arguments = [str(folder / "report"), recipe, f"output_dir={folder / 'run'}", *overrides]
        completed(train(ranks, arguments, program=[str(WORKER)], seconds=500))
        return [json.loads((folder / f"report.{rank}").read_text()) for rank in range(ranks)]

    return run
