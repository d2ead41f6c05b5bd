"""The benchmark that docs/scaling.md takes its table from: what it counts is what the plan says."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


@pytest.mark.slow
def test_counted_and_predicted_bytes_agree(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    row = scaling._measure(2, Namespace(data=str(tiny_data), steps=3))
    for what in ("all_reduce", "all_gather"):
        assert row[f"{what}_bytes"] == row[f"predicted_{what}_bytes"] > 0
    assert row["seconds_per_step"] > 0
