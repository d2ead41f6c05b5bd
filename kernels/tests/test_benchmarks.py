"""The benchmarks' machinery, not their figures: a provider that fails loses its own line and nothing else."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import dwt_kernels
import pytest
import torch

FOLDER = Path(dwt_kernels.__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """A function that imports a benchmark; its results go to ``tmp_path``."""
    if not FOLDER.exists():
        pytest.skip("the package is installed without its benchmarks")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(importlib.import_module("measure"), "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--rounds", "2"])

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("measure", "options", "logits_form", "linear_form"):
        sys.modules.pop(name, None)


def test_a_provider_that_fails_leaves_the_others_timed(benchmark):
    measure = benchmark("measure")
    calls = []

    def late() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise TypeError("no such argument: beta\nand more")

    def at_once() -> None:
        raise torch.OutOfMemoryError("out of memory")

    providers = [measure.Provider("late", late), measure.Provider("at once", at_once)]
    timings = measure.time_all([*providers, measure.Provider("sound", lambda: None)], rounds=5)
    assert timings["late"].error == "TypeError: no such argument: beta"
    assert timings["at once"].error == "OutOfMemoryError: out of memory"
    assert len(calls) == 4
    assert math.isnan(timings["late"].p50_ms)
    assert timings["sound"].error == ""
    assert timings["sound"].p50_ms >= 0


def test_the_csv_is_written_after_each_shape(benchmark, monkeypatch, tmp_path):
    """Eager torch fails at every shape; at the second, something that is no provider does."""
    logits_form = benchmark("logits_form")
    shapes = {"rows": [logits_form.Shape(rows, 50) for rows in (3, 4)]}
    monkeypatch.setattr(logits_form, "GPU_SWEEPS", shapes)
    monkeypatch.setattr(logits_form, "CPU_SWEEPS", shapes)
    monkeypatch.setattr(benchmark("measure"), "COPY_BYTES", 1 << 10)

    def failing(*_: object) -> None:
        raise RuntimeError("eager failed")

    def second_shape_fails(rows: int, *others: object, **keywords: object) -> torch.Tensor:
        if rows == 4:
            raise KeyboardInterrupt
        return torch.zeros(rows, *others, **keywords)

    monkeypatch.setattr(logits_form, "eager_loss", failing)
    monkeypatch.setattr(torch, "randn", second_shape_fails)
    with pytest.raises(KeyboardInterrupt):
        logits_form.main()
    (file,) = tmp_path.glob("*.csv")
    with file.open() as lines:
        by_provider = {line["provider"]: line for line in csv.DictReader(lines)}
    assert by_provider["dwt_kernels"]["error"] == ""
    assert float(by_provider["dwt_kernels"]["p50_ms"]) > 0
    assert "eager failed" in by_provider["eager"]["error"]


@pytest.mark.parametrize(("name", "widths"), [("logits_form", ""), ("linear_form", "x8x4")])
def test_a_run_that_was_cut_short_goes_on_at_its_next_shape(benchmark, monkeypatch, tmp_path, name, widths):
    module, measure = benchmark(name), benchmark("measure")
    monkeypatch.setattr(sys, "argv", [name, "--shapes", f"3x50{widths}", f"4x50{widths}", "--providers", "eager"])
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 10)
    outcomes = []

    def time_all(providers, rounds):
        outcome = outcomes.pop(0)
        if outcome == "interrupted":
            raise KeyboardInterrupt
        errors = {provider.name: outcome if provider.name == "eager" else "" for provider in providers}
        return {name: measure.Timing(1.0, 1.0, 1.0, 1.0, 1.0, error) for name, error in errors.items()}

    def run(*expected: str) -> None:
        outcomes[:] = expected
        module.main()
        assert outcomes == []

    monkeypatch.setattr(module, "time_all", time_all)
    with pytest.raises(KeyboardInterrupt):
        run("", "interrupted")
    run("no memory")  # at the second shape
    run("")
    run()
    (file,) = tmp_path.glob("*.csv")
    with file.open() as lines:
        assert [(line["rows"], line["error"]) for line in csv.DictReader(lines)] == [("3", ""), ("4", "")]
    for where in (measure, benchmark("options")):
        monkeypatch.setattr(where, "versions", lambda: "torch 9.9")
    run("", "")


def test_a_figure_has_lines_that_were_read_beside_new_ones(benchmark, monkeypatch, tmp_path):
    axes = pytest.importorskip("matplotlib.axes")
    plotted = []
    monkeypatch.setattr(axes.Axes, "plot", lambda self, *values, **style: plotted.append(values))
    line = {"kernel": "k", "device": "d", "provider": "p", "sweep": "rows", "peak_mib": "nan"}
    lines = [{**line, "rows": "10", "p50_ms": "2.5"}, {**line, "rows": 9, "p50_ms": 1.5}]
    benchmark("measure").draw(tmp_path / "k.csv", lines, {"rows": "rows"})
    assert plotted[0] == ([9, 10], [1.5, 2.5])


@pytest.mark.parametrize("name", ["logits_form", "linear_form"])
def test_every_vocabulary_is_measured_at_512_rows_on_a_gpu(benchmark, name):
    shapes = [tuple(shape)[:2] for sweep in benchmark(name).GPU_SWEEPS.values() for shape in sweep]
    assert {vocabulary for _, vocabulary in shapes} == {vocabulary for rows, vocabulary in shapes if rows == 512}


@pytest.mark.parametrize(
    ("name", "shape", "provider", "sizes"),
    [
        ("logits_form", "3x50", "eager", {"rows": "3", "vocabulary": "50"}),
        ("linear_form", "3x50x8x4", "eager, hard only", {"rows": "3", "student_width": "8", "teacher_width": "4"}),
    ],
)
def test_shapes_providers_and_folder_are_those_asked_for(
    benchmark, monkeypatch, tmp_path, name, shape, provider, sizes
):
    monkeypatch.setattr(benchmark("measure"), "COPY_BYTES", 1 << 10)
    out = tmp_path / "new" / "folder"
    asked = ["--rounds", "1", "--shapes", shape, "--providers", provider, "not there", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [name, *asked])
    benchmark(name).main()
    (file,) = out.iterdir()  # no figure of one shape
    with file.open() as lines:
        (line,) = csv.DictReader(lines)
    assert line["provider"] == provider
    assert {size: line[size] for size in sizes} == sizes


def test_the_matrix_rate_is_that_of_an_aligned_product(benchmark, monkeypatch, tmp_path):
    """As the linear form makes them: 50 columns would be multiplied by slower kernels, whose rate is no measure."""
    monkeypatch.setattr(sys, "argv", ["linear_form", "--shapes", "3x50x8x4", "--providers", "eager"])
    linear_form, timed = benchmark("linear_form"), []

    def time_all(providers, rounds):
        timed.append(providers[-1].step().shape)
        return {provider.name: benchmark("measure").Timing(*[1.0] * 5, "") for provider in providers}

    monkeypatch.setattr(linear_form, "time_all", time_all)
    linear_form.main()
    assert timed == [(3, 56)]
    with (tmp_path / f"linear_form_{linear_form.DEVICE}.csv").open() as lines:
        (line,) = csv.DictReader(lines)
    assert float(line["share_of_gemm_rate"]) == 50 * (3 * 8 + 4) / (8 * 56)


@pytest.mark.parametrize("shape", ["3", "3x0", "3xfifty", "3x50x8"])
def test_a_shape_that_is_none_is_refused(benchmark, monkeypatch, capsys, shape):
    monkeypatch.setattr(sys, "argv", ["logits_form", "--shapes", shape])
    with pytest.raises(SystemExit):
        benchmark("logits_form").main()
    assert f"'{shape}' is not ROWSxVOCABULARY, such as 512x512" in capsys.readouterr().err


def test_only_providers_that_are_not_there_is_an_error(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["logits_form", "--shapes", "3x50", "--providers", "ours"])
    with pytest.raises(SystemExit, match="--providers ours: none is known here"):
        benchmark("logits_form").main()
