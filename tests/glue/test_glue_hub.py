"""The hub's form of GLUE, from a folder laid out like `nyu-mll/glue`: the same loader reads both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from dwt_ds.glue import hub
from dwt_ds.glue.splits import FIRST, LABEL, SECOND
from dwt_ds.glue.tasks import TASKS, Task, find_task


def make_repository(folder: Path, task: Task, labels: tuple[str, ...] | None = None) -> Path:
    """A dataset repository with one configuration: parquet files and a card that lists them."""
    names = task.hub_labels if labels is None else labels
    kind: Any = datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=list(names))
    features = {column: datasets.Value("string") for column in task.hub_sentences}
    features |= {"label": kind, "idx": datasets.Value("int32")}
    card = ["---", "configs:", f"- config_name: {task.hub_name}", "  data_files:"]
    for number, official in enumerate((task.train, *task.validation)):
        columns: dict[str, list[Any]] = {column: [f"{column} {number}"] * 2 for column in task.hub_sentences}
        columns |= {"label": [0, 1], "idx": [0, 1]}
        path = folder / task.hub_name / f"{official.split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(path)
        card += [f"  - split: {official.split}", f"    path: {path.relative_to(folder)}"]
    (folder / "README.md").write_text("\n".join([*card, "---"]) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", ["MNLI", "SST-2", "STS-B"])
def test_columns_take_our_names(tmp_path: Path, name: str) -> None:
    task = find_task(name, "task")
    repository = make_repository(tmp_path / "glue", task)
    data = hub.read_task(task, str(repository))
    expected = {FIRST: f"{task.hub_sentences[0]} 0", LABEL: 1}
    if len(task.hub_sentences) == 2:
        expected |= {SECOND: f"{task.hub_sentences[1]} 0"}
    assert data.train.rows[1] == expected
    assert [split.split for split in data.validation] == [official.split for official in task.validation]
    assert data.validation[0].file == f"{repository}:{task.hub_name}:{task.validation[0].split}"
    assert not data.validation[0].is_official  # two rows


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    task = find_task("RTE", "task")
    repository = make_repository(tmp_path / "glue", task, labels=("not_entailment", "entailment"))
    with pytest.raises(ValueError, match="its classes are not_entailment, entailment, not entailment, not_entailment"):
        hub.read_task(task, str(repository))


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cola:train cannot be loaded: .*; give a folder of TSVs with --glue-dir"
    ) as raised:
        hub.read_task(find_task("CoLA", "task"), str(tmp_path / "none"))
    assert "\n" not in str(raised.value)


def test_every_task_has_as_many_classes_in_both_forms() -> None:
    for task in TASKS:
        assert len(task.labels) == len(task.hub_labels)
        assert len(task.sentences) == len(task.hub_sentences)
