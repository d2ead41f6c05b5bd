"""Known answers: a perfect and a constant predictor on every task, through the metrics that fine-tuning uses."""

from __future__ import annotations

import numpy as np
import pytest

from dwt_ds.glue.scores import metrics_of_logits, task_score
from dwt_ds.glue.tasks import TASKS, Task, find_task, find_tasks

ROWS = 60


def labels_of(task: Task) -> np.ndarray:
    """A third of the rows in class 1 (two thirds in class 0; a third each for three classes), or 0 to 5."""
    if task.is_regression:
        return np.linspace(0, 5, ROWS, dtype=np.float32)
    return np.arange(ROWS) % 3 if len(task.labels) == 3 else (np.arange(ROWS) % 3 == 0).astype(np.int64)


def logits_for(task: Task, predicted: np.ndarray) -> np.ndarray:
    return predicted[:, None] if task.is_regression else 4.0 * np.eye(len(task.labels))[predicted] - 1.0


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_perfect(task: Task) -> None:
    labels = labels_of(task)
    metrics = metrics_of_logits(task, logits_for(task, labels), labels)
    assert metrics == pytest.approx(dict.fromkeys(task.metrics, 100.0))
    assert task_score([metrics]) == pytest.approx(100.0)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("constant", [0, 1])
def test_constant(task: Task, constant: int) -> None:
    labels = labels_of(task)
    share = np.mean(labels == constant)
    # Always class 1: every true one found, precision is their share.
    f1 = 2 * share / (1 + share) if constant == 1 else 0.0
    known = {"accuracy": 100 * share, "f1": 100 * f1, "matthews": 0.0, "pearson": 0.0, "spearman": 0.0}
    metrics = metrics_of_logits(task, logits_for(task, np.full(ROWS, constant)), labels)
    assert metrics == pytest.approx({metric: known[metric] for metric in task.metrics})


def test_worked_by_hand() -> None:
    # 3 true and 1 false positive, 4 true and 2 false negatives.
    predicted = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 0, 1, 1])
    mrpc, cola = find_task("MRPC", "task"), find_task("CoLA", "task")
    metrics = metrics_of_logits(mrpc, logits_for(mrpc, predicted), labels)
    assert metrics == pytest.approx({"accuracy": 70.0, "f1": 100 * 6 / 9})
    assert task_score([metrics]) == pytest.approx((70 + 100 * 6 / 9) / 2)
    matthews = (3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6)
    assert metrics_of_logits(cola, logits_for(cola, predicted), labels) == pytest.approx({"matthews": 100 * matthews})


def test_spearman_sees_order_and_pearson_distance() -> None:
    stsb = find_task("STS-B", "task")
    labels = np.array([0.0, 1.0, 2.0, 5.0])
    metrics = metrics_of_logits(stsb, labels[:, None] ** 3, labels)
    assert metrics["spearman"] == pytest.approx(100.0)
    assert metrics["pearson"] == pytest.approx(100 * np.corrcoef(labels, labels**3)[0, 1])
    assert metrics["pearson"] < 97


def test_a_task_with_two_sets_counts_them_alike() -> None:
    assert task_score([{"accuracy": 80.0}, {"accuracy": 70.0}]) == 75.0


def test_a_diverged_model_is_an_error_and_not_a_class() -> None:
    sst = find_task("SST-2", "task")
    with pytest.raises(ValueError, match=r"SST-2: .* not finite; lower --learning-rate"):
        metrics_of_logits(sst, np.array([[np.nan, np.nan], [0.0, 1.0]]), np.array([0, 1]))


def test_names_of_tasks() -> None:
    assert [task.name for task in find_tasks(["rte", "stsb", "sst2", "STS-B"], "--tasks")] == ["SST-2", "STS-B", "RTE"]
