"""Compares two series seed by seed: runs with equal seeds read the same rows and masks in the same order."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from dwt_ds.distill.metrics_keys import EVAL_LOSS
from dwt_ds.study.records import RunRecord, by_series, mean_and_deviation

CANNOT_BE_TOLD = "cannot be told"
# The seed at the end of a run's name: alone-s42, alone_seed1, alone3.
_SEED = re.compile(r"([\W_]+(s|seed)?)?\d*$")
# The shares are Student's t beyond 2, with 1, 2, 4 and 9 degrees of freedom.
PAIRS_NOTE = (
    "Differences are between runs with the same seed, which see the same rows and masks in the same order: mean ± one "
    "standard deviation over the pairs, and the standard error of that mean. Better or worse means by more than two "
    "standard errors. By chance alone, two pairs differ that much in 30 of 100 cases, three in 18, five in 12 and ten "
    "in 8."
)


@dataclass(frozen=True)
class Difference:
    """The difference of a figure between two series."""

    mean: float
    deviation: float | None
    """Standard deviation over the pairs (n - 1); None for one pair."""
    pairs: int

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for one pair."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.pairs)

    def verdict(self, *, less_is_better: bool = True) -> str:
        """`better` or `worse` by more than two standard errors, else CANNOT_BE_TOLD."""
        if self.error is None or not abs(self.mean) > 2 * self.error:  # one that diverged has no mean
            return CANNOT_BE_TOLD
        return "better" if (self.mean < 0) == less_is_better else "worse"


def difference(
    pairs: Sequence[tuple[RunRecord, RunRecord]], value: Callable[[RunRecord], float | None]
) -> Difference | None:
    """Mean of value(first) - value(second) over the pairs in which both are known; None if there are none."""
    values = [(value(ours), value(theirs)) for ours, theirs in pairs]
    found = [ours - theirs for ours, theirs in values if ours is not None and theirs is not None]
    return Difference(*mean_and_deviation(found), len(found)) if found else None


def pairs_by_seed(runs: Sequence[RunRecord], reference: Sequence[RunRecord]) -> list[tuple[RunRecord, RunRecord]]:
    """Each run with the run of `reference` that has the same seed and reads the same data, if there is one."""
    theirs = {run.seed: run for run in reference}
    found = [(run, theirs[run.seed]) for run in runs if run.seed in theirs]
    return [(run, other) for run, other in found if len({run.data_fingerprint, other.data_fingerprint} - {None}) <= 1]


def add_differences(runs: Sequence[RunRecord], reference: str) -> None:
    """Set row["difference"] of each evaluation: its loss minus that of the `reference` run with the same seed."""
    groups = by_series(runs)
    theirs = groups.pop(reference, [])
    for group in groups.values():
        for run, other in pairs_by_seed(group, theirs):
            losses = {row["step"]: row[EVAL_LOSS] for row in other.held_out}
            for row in run.held_out:
                if row["step"] in losses:
                    row["difference"] = row[EVAL_LOSS] - losses[row["step"]]


def series_by_settings(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The same runs, from outside a study, with one series for all that differ in the seed alone.

    A series is named after the beginning that the names of its runs share. It has each seed once: a second run of equal
    seed and settings differs in something else, such as the program, and would count as a second pair.
    """
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    times: Counter[tuple[str, int]] = Counter()
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name not in ("seed", "output_dir")}
        key = repr((settings, run.data_fingerprint))
        groups.setdefault((key, times[key, run.seed]), []).append(run)
        times[key, run.seed] += 1
    found: dict[str, str] = {}
    for group in groups.values():
        name = _SEED.sub("", os.path.commonprefix([run.name for run in group])) if len(group) > 1 else group[0].name
        # The names of two groups may begin alike.
        found.update({run.name: name if name and name not in found.values() else group[0].name for run in group})
    return [replace(run, series_name=found[run.name]) for run in runs]


def lone_series(runs: Sequence[RunRecord]) -> str | None:
    """The lone student's series. Of several: among those with the most seeds, the one with the lowest mean loss."""
    groups = by_series([run for run in runs if run.is_alone and run.held_out])
    means = {name: fmean(run.final_loss for run in group) for name, group in groups.items()}
    return min(groups, key=lambda name: (-len(groups[name]), math.isnan(means[name]), means[name]), default=None)


def find_series(name: str, runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs of a series, named as in the tables or like its runs, with or without the seed; [] if there is none."""
    for series, group in by_series(runs).items():
        if name == series or any(name in (run.name, run.name.rpartition("-s")[0]) for run in group):
            return group
    return []
