"""A folder of TSVs in GLUE's own layouts, with other file names where its `files.json` says so."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from dwt_ds.base.words import nearest
from dwt_ds.glue.splits import FIRST, LABEL, SECOND, Split, TaskData
from dwt_ds.glue.tasks import OfficialSplit, Task, find_task

_SPLIT_KEYS = ("train", "validation", "validation_matched", "validation_mismatched")
# QQP's train.tsv has a few rows with a stray tab. More than this share is no longer QQP's doing.
_SPOILED_SHARE = 1e-3


def read_task(folder: Path, task: Task) -> TaskData:
    """Training and validation rows of a task.

    Args:
        folder: holds a folder for each task (`CoLA/train.tsv`), and perhaps a files.json that names other files:
            {"QNLI": {"train": "train_9k.tsv", "validation": "dev.tsv"}}. For MNLI, `validation` names one set in
            place of both; `validation_matched` and `validation_mismatched` name them one by one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files.json, columns or labels are not what they should be; one line with file and line number.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--glue-dir {folder}: no such folder; it should hold CoLA/train.tsv and so on")
    named = _read_files_json(folder).get(task.name, {})
    splits = {each.split: named.get(each.split, each.file) for each in task.validation}
    if "validation" in named:
        splits = {"validation": named["validation"]}
    return TaskData(
        train=_read_split(folder, task, "train", named.get("train", task.train.file), (task.train,)),
        validation=tuple(_read_split(folder, task, split, file, task.validation) for split, file in splits.items()),
    )


def _read_files_json(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "files.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from error
    shape = '{"QNLI": {"train": "train_9k.tsv", "validation": "dev.tsv"}}'
    if not isinstance(content, dict) or not all(isinstance(files, dict) for files in content.values()):
        raise ValueError(f"{path}: it must look like {shape}")
    by_task = {}
    for name, files in content.items():
        for key, value in files.items():
            if key not in (*_SPLIT_KEYS, "note"):
                fix = nearest(key, _SPLIT_KEYS) or f"; use {', '.join(_SPLIT_KEYS)} or note"
                raise ValueError(f"{path}: {name} has an unknown key {key!r}{fix}")
            if not isinstance(value, str):
                raise ValueError(f"{path}: {name}.{key} is {value!r}; it must be the name of a file")
        by_task[find_task(name, str(path)).name] = files
    return by_task


def _read_split(folder: Path, task: Task, split: str, file: str, officials: tuple[OfficialSplit, ...]) -> Split:
    path = folder / task.name / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; put GLUE's own there, name another in {folder / 'files.json'}, "
            "or choose other tasks with --tasks"
        )
    columns, spoiled = _read_tsv(path, task)
    features = {FIRST: datasets.Value("string"), SECOND: datasets.Value("string"), LABEL: _label_type(task)}
    return Split(
        split=split,
        file=file,
        rows=datasets.Dataset.from_dict(columns, datasets.Features({name: features[name] for name in columns})),
        official=next((each for each in officials if each.file == file), None),
        left_out=spoiled,
    )


def _label_type(task: Task) -> datasets.Value:
    return datasets.Value("float32" if task.is_regression else "int64")


def _read_tsv(path: Path, task: Task) -> tuple[dict[str, list[Any]], int]:
    """Columns, and how many spoiled rows were left out of them."""
    rows = _fields(path, task)
    header = list(task.header) if task.header else next(rows, (0, []))[1]
    wanted = (*task.sentences, task.label)
    for column in wanted:
        if column not in header:
            raise ValueError(
                f"{path}: no column {column!r} among {', '.join(header) or 'none'}; GLUE's {task.name} has "
                f"{', '.join(wanted)}"
            )
    places = [header.index(column) for column in task.sentences]
    label_place = header.index(task.label)
    columns: dict[str, list[Any]] = {name: [] for name in (FIRST, SECOND)[: len(places)]} | {LABEL: []}
    spoiled = []
    for line, fields in rows:
        if len(fields) != len(header):
            spoiled.append(f"{path}:{line}: {len(fields)} columns where {len(header)} are due")
            if not task.csv_quotes:
                raise ValueError(f"{spoiled[0]}; is it GLUE's {task.name}, with tabs between columns?")
            continue
        for name, place in zip((FIRST, SECOND), places):
            columns[name].append(fields[place])
        columns[LABEL].append(_label(task, fields[label_place], f"{path}:{line}"))
    if not columns[LABEL]:
        raise ValueError(f"{path}: it holds no rows")
    if len(spoiled) > _SPOILED_SHARE * len(columns[LABEL]):
        raise ValueError(f"{spoiled[0]}, and {len(spoiled)} such rows in all; is it GLUE's {task.name}?")
    return columns, len(spoiled)


def _fields(path: Path, task: Task) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row, the header included."""
    quoting: Any = csv.QUOTE_MINIMAL if task.csv_quotes else csv.QUOTE_NONE
    # utf-8-sig: the MRPC corpus that GLUE's own script cuts into files starts with a byte order mark.
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=quoting)
        try:
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}") from error


def _label(task: Task, text: str, where: str) -> float | int:
    if not task.is_regression:
        if text in task.labels:
            return task.labels.index(text)
        raise ValueError(f"{where}: label {text!r} is none of {', '.join(task.labels)}")
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 5:
        raise ValueError(f"{where}: score {text!r} is no number from 0 to 5")
    return score
