"""Shared by all figures: size, units and numbers of an axis, a legend that is never cut off, files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from dwt_ds.study.records import X_AXES, RunRecord

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

LEGEND_POINTS = 8.5
# Inches. Small, so that on a phone, where a figure is as wide as the screen, its text is as large as the page's.
_WIDTH, _HEIGHT, _DPI = 4.4, 3.4, 180
# Inches below the axes for each further ruler.
_RULER = 0.55
# (columns, letters per line) to try for a legend, until it is not wider than the figure.
_LEGEND_SHAPES = ((2, 1000), (1, 1000), (1, 40), (1, 25))
_TICKS: dict[str, Any] = {"nbins": 5, "steps": [1, 2, 2.5, 5, 10]}


class Unit(NamedTuple):
    """What the numbers along an axis count."""

    size: float
    """Tokens, seconds or steps in one."""
    name: str


# The largest unit of which a run has at least two, else the smallest.
_UNITS = {
    "step": (Unit(1, "optimizer steps"),),
    "tokens": (Unit(1e9, "billions of tokens"), Unit(1e6, "millions of tokens"), Unit(1e3, "thousands of tokens")),
    "elapsed_seconds": (Unit(3600, "hours"), Unit(60, "minutes"), Unit(1, "seconds")),
}


def unit_of(x: str, runs: Sequence[RunRecord]) -> Unit:
    """The unit for an axis of steps, tokens or seconds (`x` is one of X_AXES) that keeps its numbers short."""
    longest = max((run.training[-1][x] for run in runs if run.training), default=0)
    return next((unit for unit in _UNITS[x] if longest >= 2 * unit.size), _UNITS[x][-1])


def canvas() -> tuple[Figure, Axes]:
    """An empty figure; all figures have the same width."""
    figure, axes = plt.subplots(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def number_x(axes: Axes, unit: Unit) -> None:
    """Name the x axis and format its numbers like `20,000`."""
    axes.set_xlabel(unit.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=unit.name == "optimizer steps", **_TICKS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def add_rulers(figure: Figure, axes: Axes, run: RunRecord) -> None:
    """Add rulers of tokens and time below the steps, with round numbers at the steps they belong to."""
    room = _RULER * (len(X_AXES) - 1)
    whole = _HEIGHT + room
    figure.set_figheight(whole)
    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine)
    layout.set(rect=(0, room / whole, 1, _HEIGHT / whole))
    figure.draw_without_rendering()
    # The axes stay where they are: the rulers go into the room below them.
    figure.set_layout_engine("none")
    height = axes.get_position().height * whole
    left, right = axes.get_xlim()
    steps = np.array([row["step"] for row in run.training])
    for place, x in enumerate(X_AXES[1:], start=1):
        unit = unit_of(x, [run])
        values = np.array([row[x] for row in run.training]) / unit.size
        ends = np.interp([max(left, steps[0]), min(right, steps[-1])], steps, values)
        ticks = [tick for tick in MaxNLocator(**_TICKS).tick_values(*ends) if ends[0] <= tick <= ends[1]]
        ruler = axes.secondary_xaxis(-_RULER * place / height)
        ruler.set_xticks(np.interp(ticks, values, steps), [f"{tick:,.10g}" for tick in ticks])
        ruler.set_xlabel(unit.name)


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend below the axes, which keep their height; inside, it would hide the ends of the lines."""
    handles, names = axes.get_legend_handles_labels()
    legend: Legend | None = None
    for columns, letters in _LEGEND_SHAPES:
        if legend is not None:
            legend.remove()
        wrapped = [textwrap.fill(name, letters) for name in names]
        look: dict[str, Any] = {"ncols": columns, "fontsize": LEGEND_POINTS, "frameon": False}
        legend = figure.legend(handles, wrapped, loc="outside lower center", **look)
        extent = legend.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        if extent.width <= _WIDTH * figure.dpi:
            break
    figure.set_figheight(_HEIGHT + extent.height / figure.dpi)


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
