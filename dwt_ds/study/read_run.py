"""What runs left behind, read for tables and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from dwt_ds.glue.tasks import SEVEN
from dwt_ds.run.folder import RunFolder
from dwt_ds.study.grid import NO_TEACHER
from dwt_ds.study.scores import FOLDER as GLUE_FOLDER

_METRICS = "metrics.jsonl"
# What a curve may be drawn against.
X_AXES = ("step", "tokens", "elapsed_seconds")


@dataclass(frozen=True)
class RunRecord:
    """A run with its place in a study."""

    name: str
    path: Path
    labels: dict[str, str] = field(default_factory=dict)
    teacher_run: str | None = None
    status: str = "finished"

    @property
    def series(self) -> str:
        """What runs that differ in their seed alone have in common, for people."""
        stem, _, seed = self.name.rpartition("-s")
        return (stem if seed.isdigit() else self.name).replace("_", " ").replace("-", ", ")

    @property
    def seed(self) -> int:
        """Of weights, data order and masks."""
        return int(self.config["seed"])

    @property
    def is_alone(self) -> bool:
        """Whether it is a student that trains without a teacher."""
        return self.labels.get("teacher") == NO_TEACHER

    @cached_property
    def config(self) -> dict[str, Any]:
        """Settings as resolved."""
        content: dict[str, Any] = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        return content

    @cached_property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return RunFolder(str(self.path)).finished_steps() > 0

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """Logged steps, the earliest first."""
        return [row for row in metrics_rows(self.path) if row.get("hard_loss") is not None]

    @cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """Looks at the held-out text, with the tokens and seconds of their steps, the earliest first."""
        steps = [row["step"] for row in self.training]
        rows = []
        for row in held_out_rows(self.path):
            at = {axis: float(np.interp(row["step"], steps, [each[axis] for each in self.training])) for axis in X_AXES}
            rows.append({**at, **row})
        return rows

    @property
    def final_loss(self) -> float:
        """The last held-out MLM loss, nats a masked token."""
        return float(self.held_out[-1]["eval_hard_loss"])

    @cached_property
    def scores(self) -> dict[int, list[float]]:
        """Optimizer step -> fine-tuned score of each fine-tuning seed, in points; steps without one are left out."""
        found = {}
        for path in sorted((self.path / GLUE_FOLDER).glob("step_*/results.json")):
            scores = glue_scores(json.loads(path.read_text(encoding="utf-8")))
            if scores:
                found[int(path.parent.name.removeprefix("step_"))] = scores
        return found

    @property
    def final_scores(self) -> list[float]:
        """Those of the last export that was fine-tuned."""
        return self.scores[max(self.scores)]

    @cached_property
    def scored_tasks(self) -> list[str]:
        """Tasks in `scores`."""
        for path in (self.path / GLUE_FOLDER).glob("step_*/results.json"):
            return list(json.loads(path.read_text(encoding="utf-8"))["tasks"])
        return []


def metrics_rows(run: Path) -> list[dict[str, Any]]:
    """Objects of metrics.jsonl; a torn last line, as a kill leaves it, is passed over."""
    path = run / _METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def held_out_rows(run: Path) -> list[dict[str, Any]]:
    """Looks at the held-out text, the earliest first."""
    return [row for row in metrics_rows(run) if row.get("eval_hard_loss") is not None]


def glue_scores(results: dict[str, Any]) -> list[float]:
    """A number a seed out of a results.json of `dwt-ds glue`: the mean of the seven tasks, or of those it has."""
    whole = results["mean_of_seven"]["by_seed"]
    if whole:
        return list(whole.values())
    tasks = [task["score"]["by_seed"] for name, task in results["tasks"].items() if name in SEVEN]
    seeds = sorted(set.intersection(*map(set, tasks))) if tasks else []
    return [fmean(task[seed] for task in tasks) for seed in seeds]


def by_series(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs by what they have in common but for the seed, in the order they came."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.series, []).append(run)
    return groups


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation (n - 1) where there are two or more."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def compare_with_alone(runs: Sequence[RunRecord]) -> None:
    """Give every look of a student with a teacher `less_alone`: its loss less the lone student's of the same seed."""
    alone = {(run.seed, row["step"]): row["eval_hard_loss"] for run in runs if run.is_alone for row in run.held_out}
    for run in runs:
        for row in run.held_out:
            if run.teacher_run is not None and (run.seed, row["step"]) in alone:
                row["less_alone"] = row["eval_hard_loss"] - alone[run.seed, row["step"]]
