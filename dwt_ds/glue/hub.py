"""GLUE from `nyu-mll/glue` on the Hugging Face hub."""

from __future__ import annotations

import datasets

from dwt_ds.base.words import one_line
from dwt_ds.glue.splits import FIRST, LABEL, SECOND, Split, TaskData
from dwt_ds.glue.tasks import OfficialSplit, Task

REPOSITORY = "nyu-mll/glue"


def read_task(task: Task, repository: str = REPOSITORY) -> TaskData:
    """Training and validation rows of a task; downloaded once, then taken from the cache of `datasets`.

    Raises:
        ValueError: the dataset cannot be loaded, or its columns or classes are not GLUE's.
    """
    return TaskData(
        train=_read_split(repository, task, task.train),
        validation=tuple(_read_split(repository, task, official) for official in task.validation),
    )


def _read_split(repository: str, task: Task, official: OfficialSplit) -> Split:
    name = f"{repository}:{task.hub_name}:{official.split}"
    try:
        loaded = datasets.load_dataset(repository, task.hub_name, split=official.split)
    except Exception as error:  # the library raises errors of many kinds, its network layers' included
        raise ValueError(
            f"{name} cannot be loaded: {one_line(error)}; give a folder of TSVs with --glue-dir"
        ) from error
    missing = {*task.hub_sentences, "label"} - set(loaded.column_names)
    if missing:
        raise ValueError(f"{name} has no column {min(missing)!r}, only {', '.join(loaded.column_names)}")
    classes = tuple(getattr(loaded.features["label"], "names", ()))
    if classes != task.hub_labels:
        raise ValueError(f"{name}: its classes are {', '.join(classes)}, not {', '.join(task.hub_labels)}")
    columns = dict(zip(task.hub_sentences, (FIRST, SECOND))) | {"label": LABEL}
    return Split(
        split=official.split,
        file=name,
        rows=loaded.select_columns(list(columns)).rename_columns(columns),
        official=official,
    )
