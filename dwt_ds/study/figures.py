"""The report's figures. Series differ in marker and dashes as well as in colour (Okabe and Ito's palette)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from dwt_ds.study.records import X_AXES, RunRecord, by_series, mean_and_deviation

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_DASHES = ("--", "-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
X_NAMES = {"step": "optimizer steps", "tokens": "millions of tokens", "elapsed_seconds": "seconds of training"}
_X_UNITS = {"tokens": 1e6}
Y_NAMES = {
    "eval_hard_loss": "held-out cross-entropy",
    "hard_loss": "training cross-entropy (hard)",
    "soft_loss": "KL from the teacher (soft)",
    "soft_weight": "weight of the soft loss",
    "less_alone": "held-out, minus the lone student's",
    "temperature": "temperature",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
}
# What a single run's page shows, where the run has it.
Y_OF_ONE = ("eval_hard_loss", "soft_loss", "soft_weight", "temperature", "learning_rate", "grad_norm")
# The recipe's; a figure of a constant would show nothing that the table of settings does not.
_SETTINGS = ("soft_weight", "temperature", "learning_rate")
# Small on purpose: on a phone a figure is as wide as the screen, and its text must stay as large as the page's.
_SIZE, _DPI, _LEGEND_POINTS = (4.4, 3.4), 180, 8.5
# As many get a marker each.
_FEW_POINTS = 40

# Lee et al. (2023), figure 2: means of seven GLUE tasks.
PAPER_ALONE = 79.89
PAPER_TEACHERS = {
    "weak (4 layers)": (77.66, 81.33),
    "very weak (2)": (66.45, 78.52),
    "extremely weak (1)": (53.87, 77.13),
}


class Styles:
    """One style per series, the same in all figures of a report."""

    def __init__(self, names: Sequence[str]) -> None:
        self._index = {name: number for number, name in enumerate(names)}

    def of(self, name: str) -> dict[str, Any]:
        """Keyword arguments for `plot`."""
        number = self._index[name]
        # Beyond eight series a colour is used again, with other dashes and another marker.
        turn = number // len(_COLOURS)
        pick = (number + 3 * turn) % len(_DASHES)
        return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _DASHES[pick], "marker": _MARKERS[pick]}


def curves(
    runs: Sequence[RunRecord],
    x: str,
    y: str,
    styles: Styles,
    path: Path,
    *,
    first_step: int = 0,
    with_training: bool = False,
) -> Path | None:
    """Draw the mean over seeds of `y` against `x` for each series, with a band of one standard deviation.

    Args:
        runs: one or more for each series.
        x: a name of X_NAMES.
        y: a name of Y_NAMES.
        styles: of all series.
        path: PNG file to write.
        first_step: leave out earlier steps, whose steep fall would flatten the rest.
        with_training: also draw each run's training cross-entropy (hard), as a thin line.

    Returns:
        `path`, or None if no run has any data, or if `y` is a setting that no run changes on its way.
    """
    if y in _SETTINGS and all(_is_constant(run, y) for run in runs):
        return None
    figure, axes = _canvas()
    drawn = False
    for name, group in by_series(runs).items():
        if with_training:
            thin = {**styles.of(name), "marker": "", "linewidth": 0.8, "alpha": 0.6}
            for run in group:
                axes.plot(*zip(*_points(run, x, "hard_loss", first_step)), **thin)
        lines = [_points(run, x, y, first_step) for run in group]
        lines = [line for line in lines if line]
        if not lines:
            continue
        length = min(len(line) for line in lines)
        xs = np.mean([[point[0] for point in line[:length]] for line in lines], axis=0)
        ys = np.array([[point[1] for point in line[:length]] for line in lines])
        look = {**styles.of(name), "markersize": 4, "markevery": max(1, length // 8), "linewidth": 1.4}
        axes.plot(xs, ys.mean(axis=0), label=name, **look)
        if len(lines) > 1:
            spread = ys.std(axis=0, ddof=1)
            axes.fill_between(xs, ys.mean(axis=0) - spread, ys.mean(axis=0) + spread, color=look["color"], alpha=0.15)
        drawn = True
    if not drawn:
        plt.close(figure)
        return None
    axes.set(xlabel=X_NAMES[x], ylabel=f"{Y_NAMES[y]}{' (thin: training)' if with_training else ''}")
    _legend_below(figure, axes)
    if y == "less_alone":
        axes.axhline(0.0, color="black", linewidth=0.8)
    return _save(figure, path)


def run_curve(run: RunRecord, y: str, path: Path, *, first_step: int = 0) -> Path | None:
    """Draw one quantity of one run, every row of it, above three rulers: steps, tokens and time.

    Beside held-out losses, those of training are drawn as a thin line. Arguments and result as of `curves`.
    """
    points = _points(run, "step", y, first_step)
    if not points or (y in _SETTINGS and _is_constant(run, y)):
        return None
    figure, axes = _canvas()
    if y == "eval_hard_loss":
        axes.plot(*zip(*_points(run, "step", "hard_loss", first_step)), color=_COLOURS[1], alpha=0.6, linewidth=0.9)
    marker = "o" if len(points) <= _FEW_POINTS else ""
    colour = _COLOURS[0] if y == "eval_hard_loss" else _COLOURS[1]
    axes.plot(*zip(*points), color=colour, linewidth=1.4, marker=marker, markersize=4)
    if y == "eval_hard_loss":
        axes.legend(["training", "held-out"], fontsize=_LEGEND_POINTS, frameon=False)
    axes.set(xlabel=X_NAMES["step"], ylabel="cross-entropy" if y == "eval_hard_loss" else Y_NAMES[y])
    figure.set_figheight(_SIZE[1] + 0.8)
    _add_rulers(axes, run)
    return _save(figure, path)


def _add_rulers(axes: Axes, run: RunRecord) -> None:
    """Below the steps, tokens and seconds: each at round numbers, placed at the steps that they belong to."""
    left, right = axes.get_xlim()
    steps = np.array([row["step"] for row in run.training])
    for place, x in enumerate(X_AXES[1:], start=1):
        values = np.array([row[x] for row in run.training]) / _X_UNITS.get(x, 1)
        ends = np.interp([max(left, steps[0]), min(right, steps[-1])], steps, values)
        ticks = [tick for tick in MaxNLocator(5).tick_values(*ends) if ends[0] <= tick <= ends[1]]
        ruler = axes.secondary_xaxis(-0.24 * place)
        ruler.set_xticks(np.interp(ticks, values, steps), [f"{tick:g}" for tick in ticks])
        ruler.set_xlabel(X_NAMES[x])


def scores_along(runs: Sequence[RunRecord], styles: Styles, tasks: str, path: Path) -> Path:
    """Fine-tuned scores of the exports along the pre-training (the paper's figures 3 and 4).

    The bars are a standard deviation over the seeds of pre-training and fine-tuning together.
    """
    figure, axes = _canvas()
    series = by_series([run for run in runs if run.scores])
    for number, (name, group) in enumerate(series.items()):
        steps = np.array(sorted(set.intersection(*(set(run.scores) for run in group))))
        points = [mean_and_deviation([score for run in group for score in run.scores[step]]) for step in steps]
        errors = [deviation or 0.0 for _, deviation in points]
        # Side by side, so that the bars do not cover one another.
        aside = (number - (len(series) - 1) / 2) * 0.012 * (steps[-1] - steps[0])
        means = [mean for mean, _ in points]
        axes.errorbar(steps + aside, means, errors, label=name, capsize=3, markersize=4, **styles.of(name))
    axes.set(xlabel="optimizer steps of the pre-training", ylabel=f"fine-tuned score: {tasks}")
    _legend_below(figure, axes)
    return _save(figure, path)


def paper_teacher_quality(path: Path) -> Path:
    """The paper's figure 2: the student's score with teachers of different scores."""
    figure, axes = _canvas()
    for (name, (teacher, student)), marker, colour in zip(PAPER_TEACHERS.items(), _MARKERS[1:], _COLOURS[1:]):
        axes.plot(teacher, student, linestyle="", marker=marker, color=colour, markersize=8, label=name)
    axes.axhline(PAPER_ALONE, color="black", linestyle="--", label=f"student alone ({PAPER_ALONE})")
    axes.set(xlabel="the teacher's GLUE mean", ylabel="the student's GLUE mean", title="Lee et al. (2023)")
    axes.set_xlim(50, 82)
    axes.legend(fontsize=_LEGEND_POINTS, loc="lower right")
    return _save(figure, path)


def teacher_quality(points: Mapping[str, Mapping[str, Any]], alone: Sequence[float], unit: str, path: Path) -> Path:
    """The same figure from our runs. Up and right is better in either unit.

    Args:
        points: series -> {"teacher": its value, "students": value by seed}.
        alone: the lone student's value by seed.
        unit: "loss" (held-out MLM loss, less is better) or "score" (points).
    """
    figure, axes = _canvas()
    looks = zip(points.items(), _MARKERS[1:] * 3, (_COLOURS[1:7]) * 4)
    for (name, point), marker, colour in looks:
        mean, deviation = mean_and_deviation(point["students"])
        axes.errorbar(
            point["teacher"],
            mean,
            deviation,
            marker=marker,
            color=colour,
            markersize=7,
            capsize=4,
            linestyle="",
            label=name,
        )
    mean, deviation = mean_and_deviation(alone)
    axes.axhline(mean, color="black", linestyle="--", label="student alone")
    if deviation is not None:
        axes.axhspan(mean - deviation, mean + deviation, color="black", alpha=0.1)
    of = "held-out MLM loss" if unit == "loss" else "fine-tuned score"
    axes.set(xlabel=f"the teacher's {of}", ylabel=f"the student's {of}", title="Our runs")
    if unit == "loss":
        axes.invert_xaxis()
        axes.invert_yaxis()
    axes.margins(0.12)
    axes.legend(fontsize=_LEGEND_POINTS)
    return _save(figure, path)


def _points(run: RunRecord, x: str, y: str, first_step: int) -> list[tuple[float, float]]:
    rows = run.held_out if y in ("eval_hard_loss", "less_alone") else run.training
    if y in ("soft_loss", "soft_weight", "temperature") and not run.has_teacher:
        return []
    unit = _X_UNITS.get(x, 1)
    return [
        (row[x] / unit, row[y]) for row in rows if x in row and row.get(y) is not None and row["step"] >= first_step
    ]


def _is_constant(run: RunRecord, y: str) -> bool:
    return len({value for _, value in _points(run, "step", y, 0)}) <= 1


def _canvas() -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend under the axes, which keep their height; inside it would hide the ends of the lines."""
    handles, names = axes.get_legend_handles_labels()
    rows = -(-len(names) // 2)
    figure.set_figheight(_SIZE[1] + rows * _LEGEND_POINTS * 1.6 / 72)
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=_LEGEND_POINTS, frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, bbox_inches="tight")  # the layout does not count the rulers of `run_curve`
    plt.close(figure)
    return path
