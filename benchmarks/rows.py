"""Rows of results in CSV files, and the processor that they were measured on."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def processor_and_cores() -> str:
    """The processor's name, and how many cores the process may use."""
    return f"{processor()} x {len(os.sched_getaffinity(0))}"


def append_row(results: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file; the first row of a file brings its header."""
    results.parent.mkdir(exist_ok=True)
    new = not results.exists()
    with open(results, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def write_rows(results: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file anew."""
    results.unlink(missing_ok=True)
    for row in rows:
        append_row(results, row)
