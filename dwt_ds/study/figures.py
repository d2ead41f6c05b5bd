"""The report's figures. Series differ in marker and dashes as well as in colour.

The colours are Okabe and Ito's; the three lightest are darker here, for a contrast of 3 to 1 on white.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from dwt_ds.distill.metrics_keys import EVAL_LOSS
from dwt_ds.study.canvas import LEGEND_POINTS, add_rulers, canvas, legend_below, number_x, save, unit_of
from dwt_ds.study.records import RunRecord, by_series, mean_and_deviation
from dwt_ds.study.scores import tasks_in_words

_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#C46A9B", "#C78800", "#3597D3", "#7F7F7F")
_DASHES = ("--", "-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
Y_NAMES = {
    EVAL_LOSS: "held-out cross-entropy",
    "hard_loss": "training cross-entropy (hard)",
    "soft_loss": "KL from the teacher (soft)",
    "soft_weight": "weight of the soft loss",
    "difference": "held-out cross-entropy, difference",
    "temperature": "temperature",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
}
# Shown on the page of a single run besides the held-out losses, if the run has them.
Y_OF_ONE = ("soft_loss", "soft_weight", "temperature", "learning_rate", "grad_norm")
# Settings of the recipe: drawn only if they change, since the table of settings has the constants.
_SETTINGS = ("soft_weight", "temperature", "learning_rate")
# Up to this many points get a marker each.
_FEW_POINTS = 40
# A line of more rows is drawn as this many means of equal bins: thousands of rows would be a band of noise.
_MOST_POINTS = 100
# If a gradient norm is this many times its median, the axis is logarithmic: the peak would flatten the rest.
_SPIKE = 10

# Lee et al. (2023), figure 2: means of seven GLUE tasks.
PAPER_ALONE = 79.89
PAPER_TEACHERS = {
    "weak (4 layers)": (77.66, 81.33),
    "very weak (2)": (66.45, 78.52),
    "extremely weak (1)": (53.87, 77.13),
}


def y_name(y: str) -> str:
    """The name of a quantity; `eval_hard_loss.NAME` is the loss on a set of `train.eval_sets`."""
    kind, _, name = y.partition(".")
    return f"{Y_NAMES[kind]}, {name}" if name else Y_NAMES[kind]


class Styles:
    """One style per series, the same in all figures of a report."""

    def __init__(self, names: Sequence[str]) -> None:
        self._index = {name: number for number, name in enumerate(names)}

    def of(self, name: str) -> dict[str, Any]:
        """Keyword arguments for `plot`."""
        number = self._index[name]
        # From the ninth series on, colours repeat with other dashes and markers.
        turn = number // len(_COLOURS)
        pick = (number + 3 * turn) % len(_DASHES)
        return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _DASHES[pick], "marker": _MARKERS[pick]}


def curves(
    runs: Sequence[RunRecord], x: str, y: str, styles: Styles, path: Path, *, first_step: int = 0
) -> Path | None:
    """Draw the mean over seeds of `y` against `x` for each series, with a band of one standard deviation.

    Losses of more than _MOST_POINTS rows are drawn as that many means.

    Args:
        x: one of X_AXES.
        y: a key that `y_name` knows.
        first_step: leave out earlier steps, whose steep fall would flatten the rest.

    Returns:
        `path`, or None if no run has any data, or if `y` is a setting that is constant in all runs.
    """
    if y in _SETTINGS and all(_is_constant(run, y) for run in runs):
        return None
    figure, axes = canvas()
    unit, drawn = unit_of(x, runs), False
    for name, group in by_series(runs).items():
        lines = _at_common_steps([_points(run, x, y, first_step, unit.size) for run in group])
        if not lines:
            continue
        lines = lines if y in _SETTINGS else [_means(line) for line in lines]
        xs = np.mean([[point[0] for point in line] for line in lines], axis=0)
        ys = np.array([[point[1] for point in line] for line in lines])
        look = {**styles.of(name), "markersize": 4, "markevery": max(1, len(xs) // 8), "linewidth": 1.4}
        axes.plot(xs, ys.mean(axis=0), label=name, **look)
        if len(lines) > 1:
            spread = ys.std(axis=0, ddof=1)
            axes.fill_between(xs, ys.mean(axis=0) - spread, ys.mean(axis=0) + spread, color=look["color"], alpha=0.15)
        drawn = True
    if not drawn:
        plt.close(figure)
        return None
    axes.set_ylabel(y_name(y))
    number_x(axes, unit)
    legend_below(figure, axes)
    if y == "difference":
        axes.axhline(0.0, color="black", linewidth=0.8)
    return save(figure, path)


def run_curve(run: RunRecord, y: str, path: Path, *, first_step: int = 0) -> Path | None:
    """Draw one quantity of one run, every row of it, above three rulers: steps, tokens and time.

    Where there are many rows, a thick line shows _MOST_POINTS means. Held-out losses are drawn above those of training.
    Arguments and result as of `curves`.
    """
    points = list(_points(run, "step", y, first_step).values())
    if not points or (y in _SETTINGS and _is_constant(run, y)):
        return None
    figure, axes = canvas()
    is_held_out = y.startswith(EVAL_LOSS)
    training = list(_points(run, "step", "hard_loss", first_step).values()) if is_held_out else points
    means = training if y in _SETTINGS else _means(training)
    if means is not training:
        axes.plot(*zip(*training), color=_COLOURS[1], alpha=0.3, linewidth=0.6)
    axes.plot(*zip(*means), color=_COLOURS[1], linewidth=1.0 if is_held_out else 1.4, label="training")
    if is_held_out:
        marker, label = "o" if len(points) <= _FEW_POINTS else "", y_name(y).replace(" cross-entropy", "")
        axes.plot(*zip(*points), color=_COLOURS[0], linewidth=1.4, marker=marker, markersize=4, label=label)
        axes.legend(fontsize=LEGEND_POINTS, frameon=False)
    if y == "grad_norm" and max(norms := [norm for _, norm in points]) > _SPIKE * np.median(norms) > 0 < min(norms):
        axes.set_yscale("log")
    axes.set_ylabel("cross-entropy" if is_held_out else y_name(y))
    number_x(axes, unit_of("step", [run]))
    add_rulers(figure, axes, run)
    return save(figure, path)


def scores_along(runs: Sequence[RunRecord], styles: Styles, tasks: Sequence[str], path: Path) -> Path:
    """Fine-tuned scores of the exports along the pre-training (the paper's figures 3 and 4).

    The bars are a standard deviation over the seeds of pre-training and fine-tuning together.
    """
    figure, axes = canvas()
    series: dict[str, list[dict[int, list[float]]]] = {}
    for name, group in by_series(runs).items():
        if scored := [scores for run in group if (scores := run.scores(tasks))]:
            series[name] = scored
    for number, (name, scored) in enumerate(series.items()):
        steps = np.array(sorted(set.intersection(*map(set, scored))))
        points = [mean_and_deviation([score for scores in scored for score in scores[step]]) for step in steps]
        errors = [deviation or 0.0 for _, deviation in points]
        # Shifted, so that the bars do not cover one another.
        aside = (number - (len(series) - 1) / 2) * 0.012 * (steps[-1] - steps[0])
        means = [mean for mean, _ in points]
        axes.errorbar(steps + aside, means, errors, label=name, capsize=3, markersize=4, **styles.of(name))
    axes.set_ylabel(f"fine-tuned score: {tasks_in_words(tasks)}")
    number_x(axes, unit_of("step", runs))
    legend_below(figure, axes)
    return save(figure, path)


def paper_teacher_quality(path: Path) -> Path:
    """The paper's figure 2: the student's score with teachers of different scores."""
    figure, axes = canvas()
    for (name, (teacher, student)), marker, colour in zip(PAPER_TEACHERS.items(), _MARKERS[1:], _COLOURS[1:]):
        axes.plot(teacher, student, linestyle="", marker=marker, color=colour, markersize=8, label=name)
    axes.axhline(PAPER_ALONE, color="black", linestyle="--", label=f"student alone ({PAPER_ALONE})")
    axes.set(xlabel="the teacher's GLUE mean", ylabel="the student's GLUE mean", title="Lee et al. (2023)")
    axes.set_xlim(50, 82)
    axes.legend(fontsize=LEGEND_POINTS, loc="lower right")
    return save(figure, path)


def teacher_quality(points: Mapping[str, Mapping[str, Any]], alone: Sequence[float], unit: str, path: Path) -> Path:
    """The same figure from our runs. Up and right is better in either unit.

    Args:
        points: series -> {"teacher": its value, "students": value by seed}.
        alone: the lone student's value by seed.
        unit: "loss" (held-out MLM loss, less is better) or "score" (points).
    """
    figure, axes = canvas()
    looks = zip(points.items(), cycle(_MARKERS[1:]), cycle(_COLOURS[1:7]))
    for (name, point), marker, colour in looks:
        mean, deviation = mean_and_deviation(point["students"])
        look: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 7, "capsize": 4, "linestyle": ""}
        axes.errorbar(point["teacher"], mean, deviation, label=name, **look)
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
    axes.legend(fontsize=LEGEND_POINTS)
    return save(figure, path)


def _points(run: RunRecord, x: str, y: str, first_step: int, unit: float = 1.0) -> dict[int, tuple[float, float]]:
    """Step -> (x, y)."""
    rows = run.evaluation_rows if y == "difference" or y.startswith(EVAL_LOSS) else run.training
    if y in ("soft_loss", "soft_weight", "temperature") and not run.has_teacher:
        return {}
    known = [row for row in rows if x in row and row.get(y) is not None and row["step"] >= first_step]
    return {row["step"]: (row[x] / unit, row[y]) for row in known}


def _at_common_steps(lines: Sequence[dict[int, tuple[float, float]]]) -> list[list[tuple[float, float]]]:
    """Lines with a point at each step that all of them have: runs of a series may be logged at different intervals.

    Lines without a point are left out.
    """
    drawn = [line for line in lines if line]
    common = sorted(set.intersection(*map(set, drawn))) if drawn else []
    return [[line[step] for step in common] for line in drawn if common]


def _means(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MOST_POINTS points: `points`, or the means of stretches of equal length."""
    if len(points) <= _MOST_POINTS:
        return points
    return [tuple(np.mean(stretch, axis=0)) for stretch in np.array_split(np.array(points), _MOST_POINTS)]


def _is_constant(run: RunRecord, y: str) -> bool:
    return len({value for _, value in _points(run, "step", y, 0).values()}) <= 1
