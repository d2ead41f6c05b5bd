"""Which micro-batches are measured, and in which order, with figures that are made up."""

from __future__ import annotations

import csv
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from dwt_ds.engine.cuda_graphs import NotRecordedError

pytestmark = pytest.mark.slow  # for the engine's imports


class Planner:
    """In place of another process."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, *_: Any) -> Future[int]:
        done: Future[int] = Future()
        done.set_result(1000)
        return done


class Measurements:
    """`measure_micro_batches` without a run: what it asks for, and what it finds."""

    def __init__(self, module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._module, self._folder = module, folder
        self.measured: list[tuple[str, str, str]] = []
        """Compile, graphs and rows of each measurement."""
        self.code = "first"
        self.cannot_be_recorded: list[tuple[str, str, str]] = []
        for name in ("quieten_libraries", "start_ranks", "stop_ranks", "device"):
            monkeypatch.setattr(module, name, lambda: None)
        monkeypatch.setattr(module, "matrix_rate", lambda *_: 1e12)
        monkeypatch.setattr(module, "source_hash", lambda package: self.code)
        monkeypatch.setattr(module, "ProcessPoolExecutor", Planner)
        monkeypatch.setattr(module, "time_steps", self._time_steps)

    def _time_steps(self, recipe: str, overrides: list[str], **_: Any) -> dict[str, Any]:
        settings = dict(word.split("=") for word in overrides)
        names = ("train.compile", "train.cuda_graphs", "train.micro_batch_size")
        compiled, graphs, rows = (settings[name] for name in names)
        self.measured.append((compiled, graphs, rows))
        if self.measured[-1] in self.cannot_be_recorded:
            raise NotRecordedError("train.cuda_graphs: a pass cannot be captured (why); set it to off")
        return {"flops_per_second": 5e11, "steps": 9}

    def __call__(self, *modes: tuple[str, str], micro_batches: list[int]) -> bool:
        self.measured.clear()
        return bool(
            self._module.measure_micro_batches(
                self._folder / "steps.csv",
                data=self._folder,
                teacher=self._folder,
                student=BertConfig(),
                overrides=[],
                micro_batches=micro_batches,
                modes=list(modes),
                steps=9,
                seconds=1.0,
                loop_steps=0,
            )
        )

    def rows(self) -> list[dict[str, str]]:
        with (self._folder / "steps.csv").open() as lines:
            return list(csv.DictReader(lines))


@pytest.fixture
def measure(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurements:
    return Measurements(load("micro_batches"), tmp_path, monkeypatch)


def test_a_row_of_another_device_or_of_other_code_is_measured_anew(
    measure: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    for what in ("first", "other code", "other device"):
        if what == "other code":
            measure.code = "second"
        if what == "other device":
            monkeypatch.setattr(measure._module, "processor_and_cores", lambda: "another")
        assert measure(("off", "off"), micro_batches=[4])
        assert measure.measured == [("off", "off", "4")], what
        assert measure(("off", "off"), micro_batches=[4])
        assert measure.measured == [], "it is there"
    rows = measure.rows()
    assert [row["code"] for row in rows] == ["first first", "second second", "second second"]
    assert rows[1]["device"] != rows[2]["device"] == "another"
    assert [row["planned_peak_mib"] for row in rows] == ["1000"] * 3


def test_what_needs_no_graphs_comes_first_at_all_sizes(measure: Measurements) -> None:
    assert measure(("layers", "auto"), ("off", "off"), ("layers", "off"), micro_batches=[128, 16])
    assert measure.measured == [
        ("off", "off", "128"),
        ("off", "off", "16"),
        ("layers", "off", "128"),
        ("layers", "off", "16"),
        ("layers", "auto", "128"),
        ("layers", "auto", "16"),
    ]


def test_a_pass_that_cannot_be_recorded_is_the_last_of_its_process(measure: Measurements) -> None:
    """A repetition does what was not reached, and only then what failed."""
    modes, failing = (("off", "off"), ("layers", "auto"), ("off", "auto")), ("layers", "auto", "128")
    measure.cannot_be_recorded = [failing]
    assert not measure(*modes, micro_batches=[128, 16])
    assert measure.measured == [("off", "off", "128"), ("off", "off", "16"), failing]
    assert not measure(*modes, micro_batches=[128, 16])
    assert measure.measured == [("layers", "auto", "16"), ("off", "auto", "128"), ("off", "auto", "16"), failing]
    errors = [row["error"] for row in measure.rows()]
    assert [error for error in errors if error] == [
        "NotRecordedError: train.cuda_graphs: a pass cannot be captured (why); set it to off"
    ]
    measure.cannot_be_recorded = []
    assert measure(*modes, micro_batches=[128, 16])
    assert measure.measured == [failing]
    assert not any(row["error"] for row in measure.rows())
