"""Curves for the pages of runs and of studies, by steps, tokens or time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dwt_ds.distill.metrics_keys import eval_key
from dwt_ds.study import figures
from dwt_ds.study.figures import Styles
from dwt_ds.study.page import RULERS, Page, Shown
from dwt_ds.study.records import START_LEFT_OUT, X_AXES, RunRecord

_OF_TRAINING = ("hard_loss", "soft_loss", "soft_weight")


def compared_curves(
    page: Page,
    runs: Sequence[RunRecord],
    styles: Styles,
    folder: Path,
    name: str,
    *,
    folded: bool,
    reference: str = "",
) -> None:
    """Draw the losses of several runs into shared axes, and the weight of the soft loss if it changes.

    Args:
        folder: for the PNG files, which are called NAME_LOSS_AXIS.png.
        folded: hide all but the held-out losses under a title to click.
        reference: the series from which evaluations have a `difference`.
    """
    start = first_step(runs)
    path = folder / f"{name}_difference_step.png"
    others = [run for run in runs if run.held_out and "difference" in run.held_out[-1]]
    compared = figures.curves(others, "step", "difference", styles, path) if others else None
    shown = [
        Shown(compared, f"Held-out cross-entropy minus that of {reference} with the same seed; below 0 is better.")
    ]
    held_out = held_out_keys(runs)
    for y in (*held_out, *_OF_TRAINING):
        for x in X_AXES:
            first = 0 if y == "soft_weight" else start
            drawn = figures.curves(runs, x, y, styles, folder / f"{name}_{y}_{x}.png", first_step=first)
            shown.append(Shown(drawn, _caption(figures.y_name(y), f"by {RULERS[x]}", first), ruler=x))
    open_ = 1 + len(held_out) * len(X_AXES) if folded else len(shown)
    page.figures(shown[:open_])
    page.figures(shown[open_:], folded="Training losses, and the weight of the soft loss where it changes")


def curves_of_one(page: Page, run: RunRecord, folder: Path) -> None:
    """Draw a run's losses and its settings that change, above rulers of steps, tokens and time."""
    start = first_step([run])
    shown = []
    held_out = held_out_keys([run])
    # The held-out losses are drawn above those of training. Until the first evaluation these are by themselves.
    losses = [y for y in held_out if any(row.get(y) is not None for row in run.evaluation_rows)] or ["hard_loss"]
    for y in (*losses, *figures.Y_OF_ONE):
        first = start if y in (*losses, "soft_loss") else 0
        drawn = figures.run_curve(run, y, folder / f"{y}.png", first_step=first)
        what = f"{figures.y_name(y)}, and training cross-entropy" if y in held_out else figures.y_name(y)
        shown.append(Shown(drawn, _caption(what, "by steps, tokens and time", first)))
    page.figures(shown)


def held_out_keys(runs: Sequence[RunRecord]) -> list[str]:
    """Keys of the held-out losses on the data folder and on `train.eval_sets`."""
    return [eval_key(name) for name in dict.fromkeys(["", *(name for run in runs for name in run.eval_sets)])]


def first_step(runs: Sequence[RunRecord]) -> int:
    """The step at which loss curves begin."""
    longest = max((run.training[-1]["step"] for run in runs if run.training), default=0)
    return int(longest * START_LEFT_OUT)


def _caption(what: str, against: str, first: int) -> str:
    start = f", from step {first:,}" if first else ""
    return f"{what[0].upper()}{what[1:]} {against}{start}."
