"""Scores, in points (100 x the metric), and the one place that says what a task's score and the mean of seven are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from dwt_ds.glue.tasks import SEVEN, Metric, Task


def metrics_of_logits(task: Task, logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """The task's metrics.

    Args:
        logits: (N, classes), or (N, 1) for a regression.
        labels: (N,) class numbers, or scores.

    Raises:
        ValueError: a logit is not finite: the fine-tuning has diverged.
    """
    if not np.isfinite(logits).all():
        raise ValueError(f"{task.name}: the fine-tuned model's logits are not finite; lower --learning-rate")
    predicted = logits[:, 0] if task.is_regression else logits.argmax(axis=1)
    return {metric: 100.0 * _value(metric, predicted, labels) for metric in task.metrics}


def task_score(metrics: Sequence[Mapping[str, float]]) -> float:
    """One number for a task: the mean of its metrics on each validation set, then the mean over those sets.

    That is GLUE's way: accuracy and F1 (QQP, MRPC), Pearson and Spearman (STS-B), matched and mismatched (MNLI) enter
    with equal parts. Lee et al. (2023) do not say how they join them.
    """
    return fmean(fmean(of_set.values()) for of_set in metrics)


def mean_of_seven(scores: Mapping[str, float]) -> float | None:
    """The plain mean of `task_score` over the seven tasks of `SEVEN`; None where one of them is missing.

    Args:
        scores: by task name; other tasks (RTE, WNLI) are left out.
    """
    if any(name not in scores for name in SEVEN):
        return None
    return fmean(scores[name] for name in SEVEN)


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
    # A constant correlates with nothing; scipy leaves it undefined, scikit-learn's Matthews says 0 as well.
    return 0.0 if np.isnan(value) else value
