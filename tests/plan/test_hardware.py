"""Rates in the plan's table that were measured here are those of the measurement, and those of the documents."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from dwt_ds.plan.hardware import CPU_CORE_TFLOPS, CPU_MFU, GPU_MFU, find_device

REPOSITORY = Path(__file__).parents[2]


def test_a_cpus_rate_and_share_were_measured_together() -> None:
    """In one row; `make bench` adds further ones."""
    with open(REPOSITORY / "benchmarks" / "results" / "training_speed.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["torch"].endswith("+cpu")]
    rates = [
        float(row["gemm_gflops"]) / int(row["cores"]) / 1000 for row in rows if float(row["gemm_share"]) == CPU_MFU
    ]
    assert rates[0] == pytest.approx(CPU_CORE_TFLOPS, abs=5e-4)
    assert find_device("cpu", 1).mfu == CPU_MFU


def test_documents_give_the_same_shares() -> None:
    documents = {path.name: path for path in (REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"))}
    texts = {name: " ".join(path.read_text(encoding="utf-8").split()) for name, path in documents.items()}
    shares = re.findall(r"(\d+)% of [\w' ]*measured bf16 matrix rate", " ".join(texts.values()))
    assert set(shares) == {f"{100 * CPU_MFU:.0f}"}
    assert f"MFU is {GPU_MFU} on a GPU and {CPU_MFU:.2f} on a CPU" in texts["scaling.md"]
