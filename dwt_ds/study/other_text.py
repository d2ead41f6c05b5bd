"""The study's columns for `train.eval_sets`: final losses on other text, and differences from the lone student."""

from __future__ import annotations

from collections.abc import Sequence

from dwt_ds.study.records import RunRecord, by_series, mean_and_deviation, pairs_with_alone
from dwt_ds.study.results import with_deviation


def other_text_columns(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """What follows the columns of `results_table`: two columns for each set in any run.

    A cell is empty unless all runs of its series, and all lone students they are compared with, have the loss.

    Returns:
        The head, and the cells of each row.
    """
    sets = dict.fromkeys(name for run in runs for name in run.final_set_losses)
    rows = []
    for group in by_series(runs).values():
        pairs = pairs_with_alone(group, runs)
        cells = []
        for name in sets:
            cells.append(_cell([_loss(run, name) for run in group]))
            cells.append(_cell([_difference(run, other, name) for run, other in pairs], sign=True))
        rows.append(cells)
    return [text for name in sets for text in (f"held-out MLM loss, {name}", "minus the lone student's")], rows


def _loss(run: RunRecord, name: str) -> float | None:
    return run.final_set_losses.get(name)


def _difference(run: RunRecord, other: RunRecord, name: str) -> float | None:
    ours, theirs = _loss(run, name), _loss(other, name)
    return None if ours is None or theirs is None else ours - theirs


def _cell(values: Sequence[float | None], *, sign: bool = False) -> str:
    known = [value for value in values if value is not None]
    return with_deviation(*mean_and_deviation(known), 4, sign=sign) if known and len(known) == len(values) else ""
