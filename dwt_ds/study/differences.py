"""What sets the runs of a study apart."""

from __future__ import annotations

from collections.abc import Sequence

from dwt_ds.base.trees import flatten
from dwt_ds.study.read_run import RunRecord

# Differ by nature, and say nothing.
_LEFT_OUT = ("output_dir",)


def differing_settings(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """(setting, its value in each run) of all settings in which any two runs differ, in the recipe's order."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = []
    for key in keys:
        values = [str(each.get(key, "")) for each in flat]
        if len(set(values)) > 1 and key not in _LEFT_OUT:
            rows.append((key, *values))
    return rows
