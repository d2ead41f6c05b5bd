"""Rows of results in CSV files, where these are, and the processor that they were measured on."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def processor_and_cores() -> str:
    """The processor's name, and how many cores the process may use."""
    return f"{processor()} x {len(os.sched_getaffinity(0))}"


def read_rows(results: Path) -> list[Row]:
    """The rows of a CSV file, as text; none if it is not there."""
    if not results.is_file():
        return []
    with open(results, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(results: Path, row: Row) -> None:
    """Add a row to a CSV file; the first row of a file brings its header."""
    results.parent.mkdir(parents=True, exist_ok=True)
    new = not results.exists()
    with open(results, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def write_rows(results: Path, rows: Sequence[Row]) -> None:
    """Write a CSV file anew."""
    results.unlink(missing_ok=True)
    for row in rows:
        append_row(results, row)


def matches(row: Row, key: Row) -> bool:
    """Whether the row has these values; one that was read has text for all."""
    return all(str(row[name]) == str(value) for name, value in key.items())


class Table:
    """Rows of results in a CSV file, which is written anew whenever one comes.

    Args:
        path: of the file, whose rows are read.
        figures: columns of what is measured, `error` among them.
    """

    def __init__(self, path: Path, figures: Sequence[str]) -> None:
        self._path, self._figures, self.rows = path, figures, read_rows(path)

    def has(self, key: Row) -> bool:
        """Whether there is a row with these values that did not end with an error."""
        return any(matches(row, key) and not row["error"] for row in self.rows)

    def failed(self, key: Row) -> bool:
        """Whether there is one that did."""
        return any(matches(row, key) and row["error"] for row in self.rows)

    def add(self, key: Row, measure: Callable[[], Row]) -> Exception | None:
        """Add the row of what `measure` returns, in place of an earlier one.

        If it fails, for example out of memory, the row gets the error, which is also returned.
        """
        figures: Row = {}
        failed = None
        try:
            figures = measure()
        except Exception as error:
            failed, figures["error"] = error, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        self.rows = [row for row in self.rows if not matches(row, key)]
        self.rows.append(key | {name: figures.get(name, "") for name in self._figures})
        shown = {name: value for name, value in self.rows[-1].items() if value not in ("", None)}
        print(shown, flush=True)
        self.write()
        return failed

    def write(self) -> None:
        """The whole file, after a change of `rows`."""
        write_rows(self._path, self.rows)
