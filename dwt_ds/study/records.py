"""Runs as their folders record them, for tables and figures."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dwt_ds.base.run_files import DS_JSON, IDENTITY, RECIPE
from dwt_ds.base.trees import flatten
from dwt_ds.base.yaml_and_json import read_yaml
from dwt_ds.data.overlap import Overlap
from dwt_ds.distill.metrics_keys import EVAL_LOSS, eval_losses
from dwt_ds.glue.tasks import SEVEN
from dwt_ds.run.folder import RunFolder
from dwt_ds.study.grid import NO_TEACHER
from dwt_ds.study.scores import TaskScores, mean_scores, scores_by_step

# What a curve may be drawn against.
X_AXES = ("step", "tokens", "elapsed_seconds")
# Share of a run left out at the start of a loss curve: a steep fall that would flatten the rest.
START_LEFT_OUT = 0.1
# These differ between all runs and explain nothing.
_NOT_COMPARED = ("output_dir",)


@dataclass(frozen=True)
class _Interval:
    """Training between two logged steps."""

    steps: int
    seconds: float
    """Without evaluations and checkpoints."""
    with_teacher: bool
    row: dict[str, Any]
    """Of metrics.jsonl, logged at its end."""


@dataclass(frozen=True)
class RunRecord:
    """A run, with its place in a study if it has one."""

    name: str
    path: Path
    labels: dict[str, str] = field(default_factory=dict)
    teacher_run: str | None = None
    status: str = "finished"
    series_name: str | None = None
    """Of a run outside a study. None: the study put the series into the run's name."""

    @property
    def series(self) -> str:
        """The name without its seed, as tables show it: equal for runs of a study that differ in the seed alone."""
        if self.series_name is not None:
            return self.series_name
        stem, _, seed = self.name.rpartition("-s")
        name = stem if seed.isdigit() else self.name
        # Hyphens join labels. Those inside a label, such as lr5e-4, stay.
        for label in self.labels.values():
            name = name.replace(label, label.replace("-", "\0"))
        return name.replace("_", " ").replace("-", ", ").replace("\0", "-")

    @property
    def seed(self) -> int:
        """Of weights, data order and masks."""
        return int(self.config["seed"])

    @property
    def is_alone(self) -> bool:
        """Whether it is a student that trains without a teacher."""
        return self.labels.get("teacher") == NO_TEACHER

    @property
    def is_teacher(self) -> bool:
        """Whether a study made it to be the teacher of others."""
        return "makes" in self.labels

    @cached_property
    def config(self) -> dict[str, Any]:
        """Settings as resolved."""
        return read_yaml(self.path / RECIPE, "settings")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The same by dotted names, and `train_batch_size`: the rows of a step, which the number of ranks decides."""
        return flatten(self.config) | {"train_batch_size": (self._folder.read(DS_JSON) or {}).get("train_batch_size")}

    @cached_property
    def data_fingerprint(self) -> str | None:
        """Fingerprint of the run's data folder; None if the run did not record it."""
        return (self._folder.read(IDENTITY) or {}).get("data")

    @cached_property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self._folder.finished_steps() > 0

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """Rows of logged steps, the earliest first."""
        return [row for row in self._folder.metrics_rows() if row.get("hard_loss") is not None]

    @cached_property
    def evaluation_rows(self) -> list[dict[str, Any]]:
        """Rows of evaluations, the earliest first, each with the tokens and seconds of its step.

        If the data folder has no held-out rows, these have only the losses on `train.eval_sets`.
        """
        rows = [row for row in self._folder.metrics_rows() if eval_losses(row)]
        if not self.training:
            return rows
        steps, at = [row["step"] for row in self.training], [row["step"] for row in rows]
        places = {x: np.interp(at, steps, [each[x] for each in self.training]).tolist() for x in X_AXES}
        return [{**{x: places[x][number] for x in X_AXES}, **row} for number, row in enumerate(rows)]

    @cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """The `evaluation_rows` that have a loss on the data folder's held-out rows."""
        return [row for row in self.evaluation_rows if row.get(EVAL_LOSS) is not None]

    @property
    def eval_sets(self) -> list[str]:
        """Names of the `train.eval_sets` that the run was evaluated on."""
        names = dict.fromkeys(name for row in self.evaluation_rows for name in eval_losses(row))
        return [name for name in names if name]

    @property
    def final_set_losses(self) -> dict[str, float]:
        """Name of an eval set -> its held-out MLM loss at the last evaluation, as `final_loss`."""
        return {name: _known(loss) for name, loss in eval_losses(self.evaluation_rows[-1]).items() if name}

    @property
    def overlap(self) -> Overlap | None:
        """What its vocabulary shares with its teacher's; None if that is the same, or was not written down."""
        return next((Overlap.from_row(row) for row in self.evaluation_rows if "shared_entries" in row), None)

    @property
    def is_evaluated(self) -> bool:
        """Whether there is a held-out loss with its tokens and seconds."""
        return bool(self.training and self.held_out)

    @property
    def has_teacher(self) -> bool:
        """Whether its recipe names a teacher."""
        return bool(self.config["teacher"]["path"])

    def along(self, x: str, value: float, y: str) -> float:
        """`y` where `x` is `value`, both of X_AXES: interpolated between logged steps, from 0 at the start."""
        xs, ys = ([0, *(row[axis] for row in self.training)] for axis in (x, y))
        return float(np.interp(value, xs, ys))

    def with_teacher(self, x: str, until: float) -> float:
        """Steps or tokens (`x`, of X_AXES) up to `until` in which the teacher took part.

        Not always the first ones: a run that was made longer can have its teacher again after a release.
        """
        xs = np.array([0, *(row[x] for row in self.training)])
        taught = np.diff(xs) * [interval.with_teacher for interval in self._intervals]
        return float(np.interp(until, xs, np.concatenate([[0], np.cumsum(taught)])))

    @property
    def steps_with_teacher(self) -> int:
        """Optimizer steps in which the teacher took part."""
        return sum(interval.steps for interval in self._intervals if interval.with_teacher)

    def seconds_a_step(self, *, with_teacher: bool) -> float | None:
        """Median over the logged intervals with the teacher, or without it; None if there are none.

        The first step is left out because it includes set-up.
        """
        chosen = [each for each in self._intervals if each.with_teacher == with_teacher and each.row["step"] > 1]
        return float(np.median([each.seconds / each.steps for each in chosen])) if chosen else None

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens of all ranks per second of training (no evaluations or checkpoints); None before any step."""
        seconds = sum(interval.seconds for interval in self._intervals)
        return self.training[-1]["tokens"] / seconds if seconds else None

    def mean_over_time(self, name: str) -> float | None:
        """Mean of a logged share such as `mfu`, weighted by seconds of training; None if no row has it."""
        known = [(each.seconds, each.row[name]) for each in self._intervals if each.row.get(name) is not None]
        whole = sum(seconds for seconds, _ in known)
        return sum(seconds * value for seconds, value in known) / whole if whole else None

    @cached_property
    def _intervals(self) -> list[_Interval]:
        """The intervals between logged steps, the earliest first.

        A run logs the step at which it releases its teacher, so each row holds for all steps since the row before.
        The first rate after a resume is that of the steps since then, and the first of these takes long. So no interval
        has more than its elapsed seconds. Runs of earlier versions have no `teacher_active` (they kept their teacher),
        and the first versions logged no rate: then all elapsed seconds count.
        """
        found, before = [], {"step": 0, "tokens": 0, "elapsed_seconds": 0.0}
        for row in self.training:
            steps, tokens, whole = (row[x] - before[x] for x in ("step", "tokens", "elapsed_seconds"))
            rate = row.get("tokens_per_second")
            with_teacher = bool(row.get("teacher_active", self.has_teacher))
            found.append(_Interval(steps, min(whole, tokens / rate) if rate else whole, with_teacher, row))
            before = row
        return found

    @property
    def final_loss(self) -> float:
        """The last held-out MLM loss, nats per masked token; NaN if that was not finite."""
        return _known(next(row[EVAL_LOSS] for row in reversed(self.evaluation_rows) if EVAL_LOSS in row))

    @cached_property
    def _task_scores(self) -> dict[int, TaskScores]:
        return scores_by_step(self._folder)

    def scores(self, tasks: Collection[str]) -> dict[int, list[float]]:
        """Optimizer step -> means of `tasks` in points, one per fine-tuning seed; only steps that have some."""
        found = {step: mean_scores(scores, tasks) for step, scores in self._task_scores.items()}
        return {step: scores for step, scores in found.items() if scores}

    def final_score(self, tasks: Collection[str]) -> float | None:
        """Mean over `tasks` and fine-tuning seeds of the last export; None if it has none, or is not made yet."""
        scores = self.scores(tasks).get(self._folder.finished_steps())
        return float(np.mean(scores)) if scores else None

    @cached_property
    def _folder(self) -> RunFolder:
        return RunFolder(self.path)


def _known(loss: float | None) -> float:
    return math.nan if loss is None else float(loss)


def by_series(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Series -> its runs (one per seed), in the order given."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.series, []).append(run)
    return groups


def common_tasks(runs: Sequence[RunRecord]) -> list[str]:
    """Tasks that all fine-tuned exports of the runs have a score of: a mean of other tasks is another quantity.

    Runs without any score do not count.
    """
    results = [scores for run in runs for scores in run._task_scores.values() if scores]
    return [task for task in SEVEN if results and all(task in scores for scores in results)]


def named_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Runs named after their folders. If two names are equal, parent folders are added until they differ.

    Raises ValueError if a run is given twice.
    """
    folders = [path.expanduser().resolve() for path in paths]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise ValueError(f"{paths[number]}: is given twice; name each run once")
    names = []
    for folder in folders:
        length = 1
        while sum(other.parts[-length:] == folder.parts[-length:] for other in folders) > 1:
            length += 1
        names.append("/".join(folder.parts[-length:]))
    return [RunRecord(name, folder, series_name=name) for name, folder in zip(names, folders)]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation (n - 1) of two or more values."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def differing_settings(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """(setting, its value in each run) of every setting that is not the same in all runs, in the recipe's order."""
    trees = [run.settings for run in runs]
    rows = []
    for name in dict.fromkeys(name for tree in trees for name in tree):
        values = [str(tree.get(name)) for tree in trees]
        if len(set(values)) > 1 and name not in _NOT_COMPARED:
            rows.append((name, *values))
    return rows


def settings_unlike(runs: Sequence[RunRecord], reference: str) -> list[tuple[str, str]]:
    """(series, its settings that differ from the series `reference`); seeds are left out.

    The row of the reference has its own values of all settings in which any series differs from it.
    """
    trees = {name: group[0].settings for name, group in by_series(runs).items()}
    base = trees[reference]
    names = dict.fromkeys(name for tree in (base, *trees.values()) for name in tree)
    for left_out in (*_NOT_COMPARED, "seed"):
        names.pop(left_out, None)
    unlike = {
        series: [name for name in names if str(tree.get(name)) != str(base.get(name))] for series, tree in trees.items()
    }
    unlike[reference] = [name for name in names if any(name in found for found in unlike.values())]
    order = [reference, *(series for series in trees if series != reference)]
    return [(series, ", ".join(f"{name}={trees[series].get(name)}" for name in unlike[series])) for series in order]
