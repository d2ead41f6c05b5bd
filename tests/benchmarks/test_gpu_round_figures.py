"""What the GPU round computes of rows and traces; the figures here are made up."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def test_launches_and_busy_time_of_a_trace(load: Any) -> None:
    trace: ModuleType = load("device_trace")
    kernels = [
        {"cat": "kernel", "name": "gemm", "ts": 100.0, "dur": 40.0},
        {"cat": "kernel", "name": "add", "ts": 120.0, "dur": 50.0},  # on another stream: 30 of it beside the first
        {"cat": "gpu_memcpy", "name": "copy", "ts": 110.0, "dur": 5.0},
        {"cat": "kernel", "name": "norm", "ts": 300.0, "dur": 30.0},
    ]
    calls = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cudaMemcpyAsync", "cuLaunchKernelEx", "cudaStreamSynchronize"]
    host = [{"cat": "cuda_runtime", "name": name, "ts": 0.0, "dur": 1.0} for name in calls]
    others = [{"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 900.0}, {"name": "process_name", "ph": "M"}]
    found = trace.device_work([*others, *host, *kernels], steps=2, seconds_per_step=100e-6)
    assert found == {"launches_per_step": 2, "device_operations_per_step": 2, "device_busy_share": 0.5}
    assert trace.device_work(others, steps=2, seconds_per_step=1.0) == {}


class StandInSession:
    """Steps of 100 tokens."""

    log = SimpleNamespace(
        utilization=SimpleNamespace(shares=lambda rate: {"mfu": 0.5}, peak_flops_per_second=1e12),
    )

    def steps(self) -> Iterator[int]:
        yield from range(1, 100)

    def begin_step(self, step: int, micro_batches: list[SimpleNamespace]) -> None:
        pass


@pytest.mark.slow  # for the engine's imports
def test_a_step_that_compiles_is_not_timed(load: Any, tmp_path: Path) -> None:
    """The first batch with padding, say, after several without."""
    module = load("step_speed")
    timed = module.TimedSession(StandInSession(), steps=6, seconds=60.0, trace=tmp_path / "trace.json.gz")
    for step in timed.steps():
        timed.begin_step(step, [SimpleNamespace(token_count=100)])
        if step == module.WARM_UP_STEPS + 4:
            module.counters["stats"]["unique_graphs"] += 1  # as torch.compile counts
            began = time.perf_counter()
    assert timed.figures["steps"] == 2
    assert timed.figures["tokens_per_second"] > 200 / (time.perf_counter() - began)


def test_a_table_keeps_rows_with_figures_and_repeats_those_with_errors(load: Any, tmp_path: Path) -> None:
    table = partial(load("rows").Table, figures=("mfu", "error"))
    path = tmp_path / "steps.csv"
    keys = [{"provider": "dwt_ds", "compile": "off", "micro_batch": rows} for rows in (16, 256)]

    def fails() -> dict[str, Any]:
        raise RuntimeError("CUDA out of memory\nand more")

    first = table(path)
    first.add(keys[0], lambda: {"mfu": 0.25})
    first.add(keys[1], fails)
    assert first.rows[1]["error"] == "RuntimeError: CUDA out of memory"
    second = table(path)
    assert [second.has(key) for key in keys] == [True, False]
    second.add(keys[1], lambda: {"mfu": 0.5})
    with path.open() as lines:
        assert [(row["micro_batch"], row["mfu"], row["error"]) for row in csv.DictReader(lines)] == [
            ("16", "0.25", ""),
            ("256", "0.5", ""),
        ]


def test_goals_are_judged_by_rows_and_not_measured_without(load: Any, tmp_path: Path) -> None:
    module = load("round_summary")
    assert module.summary(tmp_path).count("not measured") >= 14
    kernel = {"p50_ms": "", "share_of_copy_bandwidth": "", "vocabulary": "30522"}
    module_rows = {
        "logits_form_cuda.csv": [
            {**kernel, "provider": "dwt_kernels", "rows": "512", "p50_ms": "2"},
            {**kernel, "provider": "eager", "rows": "512", "p50_ms": "5"},
            {**kernel, "provider": "dwt_kernels", "rows": "8192", "share_of_copy_bandwidth": "0.91"},
            {**kernel, "provider": "dwt_kernels", "rows": "4096", "share_of_copy_bandwidth": "0.87"},
            {**kernel, "provider": "eager", "rows": "4096", "share_of_copy_bandwidth": "0.3"},
        ],
        "linear_form_cuda.csv": [
            {"provider": "dwt_kernels chunked", "rows": "8192", "vocabulary": "128256", "p50_ms": "27"},
            {"provider": "liger chunked", "rows": "8192", "vocabulary": "128256", "p50_ms": "60"},
            {"provider": "liger chunked", "rows": "8192", "vocabulary": "30522", "p50_ms": "20"},
        ],
        "training_steps.csv": [
            {
                "provider": "dwt_ds",
                "micro_batch": "128",
                "share_of_matrix_rate": "0.4",
                "peak_mib": "",
                "planned_peak_mib": "9",
            },
            {
                "provider": "dwt_ds",
                "micro_batch": "128",
                "share_of_matrix_rate": "0.5",
                "peak_mib": "6",
                "planned_peak_mib": "5",
            },
            {
                "provider": "dwt_ds",
                "micro_batch": "16",
                "share_of_matrix_rate": "",
                "peak_mib": "",
                "planned_peak_mib": "",
            },
        ],
    }
    for name, rows in module_rows.items():
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    passed = "[gw1] [ 9%] PASSED tests/engine/test_gpu.py::test_triton_and_torch_back_ends_train_alike[zero2_{}] \n"
    (tmp_path / "tests.log").write_text(passed.format("fp32") + passed.format("bf16") + "=== 2 passed in 9.00s ===\n")
    goals = module.summary(tmp_path).partition("## Goals")[2]
    found = [line.rsplit("|", 2)[1].strip() for line in goals.strip().splitlines()[2:]]
    assert found == ["0.87", "2.50", "0.45", "0.5", "not measured", "1.20", "2 passed"]


def test_a_held_out_loss_that_is_not_finite_is_shown_beside_the_others(load: Any, tmp_path: Path) -> None:
    rows = [{"step": 2, "loss": 6.0, "tokens_per_second": 90.0}, {"step": 2, "eval_hard_loss": None}]
    rows += [{"step": 4, "loss": 5.0, "tokens_per_second": 95.0}, {"step": 4, "eval_hard_loss": 5.5}]
    (tmp_path / "alone.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    page = load("round_summary").summary(tmp_path)
    assert "| 2 | alone | not finite | 90 |\n| 4 | alone | 5.5000 | 95 |" in page
