"""What the pages of runs and of studies have in common: curves, by steps, tokens or time as the reader likes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dwt_ds.study import figures
from dwt_ds.study.figures import Styles
from dwt_ds.study.page import Page, Shown
from dwt_ds.study.records import START_LEFT_OUT, X_AXES, RunRecord

_TITLES = {
    "hard_loss": "Training: hard loss",
    "soft_loss": "Training: soft loss",
    "soft_weight": "Weight of the soft loss",
}
_LOSSES = ("eval_hard_loss", *_TITLES)


def compared_curves(
    page: Page, runs: Sequence[RunRecord], styles: Styles, folder: Path, name: str, *, folded: bool
) -> None:
    """Draw the losses of several runs into the same axes, and the weight of the soft loss where it changes.

    Args:
        folder: for the PNG files, which are called NAME_LOSS_AXIS.png.
        folded: hide all but the held-out losses until their titles are clicked.
    """
    start = first_step(runs)
    path = folder / f"{name}_less_alone_step.png"
    with_teacher = [run for run in runs if run.held_out and "less_alone" in run.held_out[-1]]
    compared = figures.curves(with_teacher, "step", "less_alone", styles, path) if with_teacher else None
    text = "Held-out cross-entropy minus that of the lone student of the same seed; below 0 is better."
    for y in _LOSSES:
        shown = [Shown(compared, text)] if y == "eval_hard_loss" else []
        for x in X_AXES:
            first = 0 if y == "soft_weight" else start
            drawn = figures.curves(runs, x, y, styles, folder / f"{name}_{y}_{x}.png", first_step=first)
            shown.append(Shown(drawn, _caption(y, f"by {figures.X_NAMES[x]}", first), ruler=x))
        page.figures(shown, folded=_TITLES.get(y, "") if folded else "")


def curves_of_one(page: Page, run: RunRecord, folder: Path) -> None:
    """Draw a run's losses, and whatever its recipe does not keep constant, above rulers of steps, tokens and time."""
    start = first_step([run])
    shown = []
    for y in figures.Y_OF_ONE:
        first = start if y in ("eval_hard_loss", "soft_loss") else 0
        drawn = figures.run_curve(run, y, folder / f"{y}.png", first_step=first)
        shown.append(Shown(drawn, _caption(y, "by steps, tokens and time", first)))
    page.figures(shown)


def first_step(runs: Sequence[RunRecord]) -> int:
    """The step at which loss curves begin."""
    longest = max((run.training[-1]["step"] for run in runs if run.training), default=0)
    return int(longest * START_LEFT_OUT)


def _caption(y: str, against: str, first: int) -> str:
    what = figures.Y_NAMES[y]
    start = f", from step {first:,}" if first else ""
    return f"{what[0].upper()}{what[1:]} {against}{start}."
