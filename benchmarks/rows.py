"""Rows of results, and the machine they were measured on."""

from __future__ import annotations

import csv
import platform
from pathlib import Path
from typing import Any


def processor() -> str:
    """The processor's name as the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def append_row(results: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, which gets its header with the first."""
    results.parent.mkdir(exist_ok=True)
    new = not results.exists()
    with open(results, "a", newline="") as handle:
        writer = csv.DictWriter(handle, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
