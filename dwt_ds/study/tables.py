"""Shared by the tables of a study: series in rows, compared with one of them seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from dwt_ds.study.page import Page, markdown_table
from dwt_ds.study.pairs import pairs_by_seed
from dwt_ds.study.records import RunRecord, by_series, mean_and_deviation

NOT_KNOWN = "not known"
TIME_NOTE = "Seconds of runs on different machines, or beside other work, cannot be compared."


@dataclass(frozen=True)
class Table:
    """A table with a heading and a note on its columns."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str

    def add_to(self, page: Page) -> None:
        page.heading(self.title, 3)
        page.table(self.head, self.rows, kind="numbers")
        page.note(self.note)

    def markdown(self) -> str:
        return f"### {self.title}\n\n{markdown_table(self.head, self.rows)}"


class Compared:
    """Series of runs, and the pairs of runs in which each series is compared with the reference.

    Args:
        runs: finished ones, of one or more seeds a series.
        reference: the series that the others are compared with.
    """

    def __init__(self, runs: Sequence[RunRecord], reference: str) -> None:
        self.reference, self.series = reference, by_series(runs)
        theirs = self.series.get(reference, [])
        # A teacher is not compared with its students; its cost is counted with theirs.
        others = {name: group for name, group in self.series.items() if name != reference and not group[0].is_teacher}
        self.pairs = {name: found for name, group in others.items() if (found := pairs_by_seed(group, theirs))}

    def rows(
        self,
        own: Callable[[list[RunRecord]], tuple[str, ...]],
        cells: Callable[[list[tuple[RunRecord, RunRecord]]], tuple[str, ...]],
    ) -> list[tuple[str, ...]]:
        """A row for the reference, made from its runs, and one for each compared series, made from its pairs."""
        rows = []
        for name, group in self.series.items():
            if name == self.reference:
                rows.append((name, *own(group)))
            elif name in self.pairs:
                rows.append((name, *cells(self.pairs[name])))
        return rows


def with_deviation(mean: float, deviation: float | None, digits: int, unit: str = "", *, sign: bool = False) -> str:
    """`5.4690 ± 0.0390`, or the mean alone without a deviation."""
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{mean:{'+' if sign else ''}.{digits}f}{spread}{unit}"


def percent(shares: Sequence[float | None]) -> str:
    """Mean and deviation of shares; NOT_KNOWN if one is None."""
    known = [100 * each for each in shares if each is not None]
    return with_deviation(*mean_and_deviation(known), 0, "%") if len(known) == len(shares) else NOT_KNOWN


def mean_cell(values: Sequence[float | None], form: str) -> str:
    """The mean in the given format; empty if a value is None."""
    known = [each for each in values if each is not None]
    return form.format(fmean(known)) if len(known) == len(values) else ""
