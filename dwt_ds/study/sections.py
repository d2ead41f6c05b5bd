"""What the pages of runs and of studies have in common: curves, by steps, tokens or time as the reader likes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dwt_ds.study import figures
from dwt_ds.study.figures import Styles
from dwt_ds.study.page import RULERS, Page, Shown
from dwt_ds.study.records import START_LEFT_OUT, X_AXES, RunRecord

_LOSSES = ("eval_hard_loss", "hard_loss", "soft_loss", "soft_weight")


def compared_curves(
    page: Page, runs: Sequence[RunRecord], styles: Styles, folder: Path, name: str, *, folded: bool
) -> None:
    """Draw the losses of several runs into the same axes, and the weight of the soft loss where it changes.

    Args:
        folder: for the PNG files, which are called NAME_LOSS_AXIS.png.
        folded: hide all but the held-out losses until their title is clicked.
    """
    start = first_step(runs)
    path = folder / f"{name}_less_alone_step.png"
    with_teacher = [run for run in runs if run.held_out and "less_alone" in run.held_out[-1]]
    compared = figures.curves(with_teacher, "step", "less_alone", styles, path) if with_teacher else None
    shown = [
        Shown(compared, "Held-out cross-entropy minus that of the lone student of the same seed; below 0 is better.")
    ]
    for y in _LOSSES:
        for x in X_AXES:
            first = 0 if y == "soft_weight" else start
            drawn = figures.curves(runs, x, y, styles, folder / f"{name}_{y}_{x}.png", first_step=first)
            shown.append(Shown(drawn, _caption(figures.Y_NAMES[y], f"by {RULERS[x]}", first), ruler=x))
    held_out = 1 + len(X_AXES) if folded else len(shown)
    page.figures(shown[:held_out])
    page.figures(shown[held_out:], folded="Training losses, and the weight of the soft loss where it changes")


def curves_of_one(page: Page, run: RunRecord, folder: Path) -> None:
    """Draw a run's losses, and whatever its recipe does not keep constant, above rulers of steps, tokens and time."""
    start = first_step([run])
    shown = []
    for y in figures.Y_OF_ONE:
        first = start if y in ("eval_hard_loss", "soft_loss") else 0
        drawn = figures.run_curve(run, y, folder / f"{y}.png", first_step=first)
        what = "held-out and training cross-entropy" if y == "eval_hard_loss" else figures.Y_NAMES[y]
        shown.append(Shown(drawn, _caption(what, "by steps, tokens and time", first)))
    page.figures(shown)


def first_step(runs: Sequence[RunRecord]) -> int:
    """The step at which loss curves begin."""
    longest = max((run.training[-1]["step"] for run in runs if run.training), default=0)
    return int(longest * START_LEFT_OUT)


def _caption(what: str, against: str, first: int) -> str:
    start = f", from step {first:,}" if first else ""
    return f"{what[0].upper()}{what[1:]} {against}{start}."
