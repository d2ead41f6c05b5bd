"""From logits to results.json: metrics, the score of a task, the mean of the seven, and the printed table.

All scores are in points (100 x the metric). A score and the mean of the seven are defined here and nowhere else.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from dwt_ds.base import words
from dwt_ds.glue.tasks import SEVEN, Metric, Task

Pair = tuple[str, int]
"""Name of a task, seed."""
# Key of a result: what it was made with.
MADE_WITH = "made_with"

_SHORT = {"accuracy": "acc", "f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman"}


def metrics_of_logits(task: Task, logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """The task's metrics, from logits (N, classes), or (N, 1) for a regression, and labels (N,).

    Raises ValueError if a logit is not finite: the fine-tuning has diverged.
    """
    if not np.isfinite(logits).all():
        raise ValueError(f"{task.name}: the fine-tuned model's logits are not finite; lower --learning-rate")
    predicted = logits[:, 0] if task.is_regression else logits.argmax(axis=1)
    return {metric: 100.0 * _value(metric, predicted, labels) for metric in task.metrics}


def task_score(metrics: Sequence[Mapping[str, float]]) -> float:
    """One number for a task: the mean of its metrics on each validation set, then the mean over those sets.

    This is GLUE's way: accuracy and F1 (QQP, MRPC), Pearson and Spearman (STS-B), matched and mismatched (MNLI) have
    equal weights. Lee et al. (2023) do not say how they combine them.
    """
    return statistics.fmean(statistics.fmean(of_set.values()) for of_set in metrics)


def mean_of_seven(scores: Mapping[str, float]) -> float | None:
    """The plain mean of `task_score`, given by task name, over the tasks of `SEVEN`; None if one is missing."""
    if any(name not in scores for name in SEVEN):
        return None
    return statistics.fmean(scores[name] for name in SEVEN)


def _value(metric: Metric, predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    if metric == "accuracy":
        return float(accuracy_score(labels, predicted))
    if metric == "f1":
        return float(f1_score(labels, predicted, zero_division=0.0))
    if metric == "matthews":
        return float(matthews_corrcoef(labels, predicted))
    correlation = pearsonr if metric == "pearson" else spearmanr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        value = float(correlation(predicted, labels).statistic)
    # The correlation with a constant is undefined in scipy; 0, as in scikit-learn's Matthews correlation.
    return 0.0 if np.isnan(value) else value


def summarize(tasks: Sequence[Task], seeds: Sequence[int], results: Mapping[Pair, Mapping[str, Any]]) -> dict[str, Any]:
    """The `tasks` and `mean_of_seven` parts of results.json, in points.

    Args:
        results: of the finished pairs, as `fine_tune` returns them, with MADE_WITH; tasks without one are left out.

    Returns:
        For each score its mean, its standard deviation over seeds (n - 1; null for one seed) and each seed's value.
    """
    by_task = {}
    for task in tasks:
        of_task = {seed: results[task.name, seed] for seed in seeds if (task.name, seed) in results}
        if of_task:
            by_task[task.name] = _task_summary(task, of_task)
    means = {
        seed: mean_of_seven({name: results[name, seed]["score"] for name in by_task if (name, seed) in results})
        for seed in seeds
    }
    whole = {seed: mean for seed, mean in means.items() if mean is not None}
    return {
        "tasks": by_task,
        "mean_of_seven": {
            **(_over_seeds(whole) if whole else {"mean": None, "std": None, "by_seed": {}}),
            "tasks": list(SEVEN),
            "missing": [name for name in SEVEN if name not in by_task],
            "is_glue_dev": bool(whole) and all(_is_glue_dev(by_task[name]) for name in SEVEN),
        },
    }


def table(summary: Mapping[str, Any]) -> str:
    """What `summarize` returned, as a table. Sets that are not GLUE's own dev sets are marked."""
    rows = [("task", "score", "metrics", "scored on", "trained on")]
    for name, task in summary["tasks"].items():
        for number, split in enumerate(task["validation"]):
            first = number == 0
            metrics = ", ".join(f"{_SHORT[metric]} {_shown(value)}" for metric, value in split["metrics"].items())
            score, trained = (_shown(task["score"]), _trained_on(task["train"])) if first else ("", "")
            rows.append((name if first else "", score, metrics, _called(split), trained))
    return "\n".join([*words.table(rows), "", _mean_line(summary)]) + "\n"


def _task_summary(task: Task, of_task: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    one = next(iter(of_task.values()))
    made_with = one[MADE_WITH]
    validation = []
    for number, facts in enumerate(made_with["validation"]):
        metrics = {
            metric: _over_seeds({seed: result["metrics"][number][metric] for seed, result in of_task.items()})
            for metric in task.metrics
        }
        named = {("is_glue_dev" if name == "is_official" else name): value for name, value in facts.items()}
        validation.append({**named, "metrics": metrics})
    train = made_with["train"]
    return {
        "score": _over_seeds({seed: result["score"] for seed, result in of_task.items()}),
        "validation": validation,
        "train": {
            **train,
            "official_rows": task.train.rows,
            "rows_used": one["train_rows"],
            "epochs": made_with["epochs"],
            "steps": one["steps"],
        },
        "devices": sorted({result["device"] for result in of_task.values()}),
        "seconds": {str(seed): result["seconds"] for seed, result in of_task.items()},
    }


def _over_seeds(values: Mapping[int, float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values.values()),
        "std": statistics.stdev(values.values()) if len(values) > 1 else None,
        "by_seed": {str(seed): value for seed, value in values.items()},
    }


def _is_glue_dev(task: Mapping[str, Any]) -> bool:
    return all(split["is_glue_dev"] for split in task["validation"])


def _shown(value: Mapping[str, Any]) -> str:
    spread = "" if value["std"] is None else f" ± {value['std']:.2f}"
    return f"{value['mean']:.2f}{spread}"


def _called(split: Mapping[str, Any]) -> str:
    return f"{split['file']} ({'GLUE dev' if split['is_glue_dev'] else 'not GLUE dev'}, {split['rows']:,} rows)"


def _trained_on(train: Mapping[str, Any]) -> str:
    used = f"{train['rows_used']:,}"
    part = used if train["rows_used"] == train["official_rows"] else f"{used} of {train['official_rows']:,}"
    return f"{part} rows, {train['steps']:,} steps"


def _mean_line(summary: Mapping[str, Any]) -> str:
    mean = summary["mean_of_seven"]
    if mean["mean"] is None:
        why = f"no score of {', '.join(mean['missing'])}" if mean["missing"] else "no seed has all seven"
        return f"mean of the seven tasks: none ({why})"
    seeds = len(mean["by_seed"])
    other = [name for name in SEVEN if not _is_glue_dev(summary["tasks"][name])]
    note = "GLUE dev" if not other else f"not on GLUE dev throughout: {', '.join(other)}"
    return f"mean of the seven tasks: {_shown(mean)} ({seeds} seed{'s' * (seeds > 1)}; {note})"
