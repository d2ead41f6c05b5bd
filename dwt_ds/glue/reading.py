"""The rows of a task, from a folder of TSVs in GLUE's own layouts or from the hub."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import datasets

from dwt_ds.base.words import nearest, one_line
from dwt_ds.base.yaml_and_json import parse_json
from dwt_ds.glue.tasks import OfficialSplit, Task, find_task

REPOSITORY = "nyu-mll/glue"
# Columns of every `Split.rows`; SECOND only where a task has two sentences.
FIRST, SECOND, LABEL = "first", "second", "labels"
# QQP's train.tsv has a few rows with a stray tab or quote. A file with a larger share of them is not QQP's.
_SPOILED_SHARE = 1e-3


@dataclass(frozen=True)
class Split:
    """Rows of one file or of one split on the hub."""

    split: str
    file: str
    """Name of the file, or of the split on the hub."""
    rows: datasets.Dataset
    """Columns FIRST, SECOND (for pairs), LABEL: class number, or score."""
    official: OfficialSplit | None
    """GLUE's split of this file name; None if GLUE has no such name."""
    left_out: int = 0
    """Rows of the file with a stray tab or an unclosed quote, which are not in `rows`."""

    @property
    def is_official(self) -> bool:
        """Whether it is GLUE's own split, by its name and number of rows."""
        return self.official is not None and len(self.rows) == self.official.rows

    @cached_property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for batch in self.rows.iter(batch_size=1000):
            digest.update(repr(batch).encode())
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """What results record about it, and compare before they are reused."""
        return {
            "split": self.split,
            "file": self.file,
            "rows": len(self.rows),
            "left_out": self.left_out,
            "is_official": self.is_official,
            "identity": self.identity,
        }


@dataclass(frozen=True)
class TaskData:
    """Training and validation rows of a task."""

    train: Split
    validation: tuple[Split, ...]


def read_task(task: Task, glue_dir: Path | None) -> TaskData:
    """Training and validation rows of a task from `glue_dir`, or from the hub if that is None; errors as below."""
    return read_hub(task) if glue_dir is None else read_folder(task, glue_dir)


def read_hub(task: Task, repository: str = REPOSITORY) -> TaskData:
    """Training and validation rows of a task; `datasets` downloads them once and caches them.

    Raises ValueError if the dataset cannot be loaded, or its columns or classes are not GLUE's.
    """
    return TaskData(
        train=_read_hub_split(repository, task, task.train),
        validation=tuple(_read_hub_split(repository, task, official) for official in task.validation),
    )


def _read_hub_split(repository: str, task: Task, official: OfficialSplit) -> Split:
    name = f"{repository}:{task.hub_name}:{official.split}"
    try:
        loaded = datasets.load_dataset(repository, task.hub_name, split=official.split)
    except Exception as error:  # the library raises errors of many kinds, its network layers' included
        raise ValueError(
            f"{name} cannot be loaded: {one_line(error)}; give a folder of TSVs with --glue-dir"
        ) from error
    missing = {*task.hub_sentences, "label"} - set(loaded.column_names)
    if missing:
        raise ValueError(
            f"{name} has no column {min(missing)!r}, only {', '.join(loaded.column_names)}; give a folder of TSVs with "
            "--glue-dir"
        )
    classes = tuple(getattr(loaded.features["label"], "names", ()))
    if classes != task.hub_labels:
        raise ValueError(
            f"{name}: its classes are {', '.join(classes)}, not {', '.join(task.hub_labels)}; give a folder of TSVs "
            "with --glue-dir"
        )
    columns = dict(zip(task.hub_sentences, (FIRST, SECOND))) | {"label": LABEL}
    return Split(
        split=official.split,
        file=name,
        rows=loaded.select_columns(list(columns)).rename_columns(columns),
        official=official,
    )


def read_folder(task: Task, folder: Path) -> TaskData:
    """Training and validation rows of a task.

    Args:
        folder: has a folder per task (`CoLA/train.tsv`). An optional files.json names other files:
            {"QNLI": {"train": "train_9k.tsv", "validation": "dev.tsv"}}. For MNLI, `validation` names one set instead
            of both; `validation_matched` and `validation_mismatched` name them one by one.

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
        train=_read_file(folder, task, "train", named.get("train", task.train.file), (task.train,)),
        validation=tuple(_read_file(folder, task, split, file, task.validation) for split, file in splits.items()),
    )


def _read_files_json(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "files.json"
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shape = '{"QNLI": {"train": "train_9k.tsv", "validation": "dev.tsv"}}'
    if not isinstance(content, dict) or not all(isinstance(files, dict) for files in content.values()):
        raise ValueError(f"{path}: must look like {shape}")
    by_task = {}
    for name, files in content.items():
        task = find_task(name, str(path))
        one_by_one = [each.split for each in task.validation]
        known = list(dict.fromkeys(["train", "validation", *one_by_one]))
        for key, value in files.items():
            if key not in (*known, "note"):
                fix = nearest(key, known) or f"; use {', '.join(known)} or note"
                raise ValueError(f"{path}: {name} has an unknown key {key!r}{fix}")
            if not isinstance(value, str):
                raise ValueError(f"{path}: {name}.{key}={value!r}: must be the name of a file")
            if key in one_by_one and key != "validation" and "validation" in files:
                raise ValueError(f"{path}: {name} has both validation and {key}, two names of one set; remove one")
        by_task[task.name] = files
    return by_task


def _read_file(folder: Path, task: Task, split: str, file: str, officials: tuple[OfficialSplit, ...]) -> Split:
    path = folder / task.name / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; put GLUE's own there, name another in {folder / 'files.json'}, "
            "or choose other tasks with --tasks"
        )
    columns, spoiled = _read_tsv(path, task)
    label = datasets.Value("float32" if task.is_regression else "int64")
    features = {FIRST: datasets.Value("string"), SECOND: datasets.Value("string"), LABEL: label}
    return Split(
        split=split,
        file=file,
        rows=datasets.Dataset.from_dict(columns, datasets.Features({name: features[name] for name in columns})),
        official=next((each for each in officials if each.file == file), None),
        left_out=spoiled,
    )


def _read_tsv(path: Path, task: Task) -> tuple[dict[str, list[Any]], int]:
    """Columns, and the number of spoiled rows, which are not in them."""
    rows = _fields(path, task)
    header = list(task.header) if task.header else next(rows, (0, [], ""))[1]
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
    for line, fields, flaw in rows:
        if flaw or len(fields) != len(header):
            spoiled.append(f"{path}:{line}: {flaw or f'{len(fields)} columns, not {len(header)}'}")
            if not task.csv_quotes:
                raise ValueError(f"{spoiled[0]}; is it GLUE's {task.name}, with tabs between columns?")
            continue
        for name, place in zip((FIRST, SECOND), places):
            columns[name].append(fields[place])
        columns[LABEL].append(_label(task, fields[label_place], f"{path}:{line}"))
    if not columns[LABEL]:
        raise ValueError(f"{path}: no rows; replace it with GLUE's own file")
    if len(spoiled) > _SPOILED_SHARE * len(columns[LABEL]):
        raise ValueError(f"{spoiled[0]}, and {len(spoiled)} such rows in all; is it GLUE's {task.name}?")
    return columns, len(spoiled)


def _fields(path: Path, task: Task) -> Iterator[tuple[int, list[str], str]]:
    """(line number, fields, what is wrong with the quotes or "") of each row, the header included."""
    # utf-8-sig: the MRPC corpus that GLUE's own script cuts into files starts with a byte order mark.
    with open(path, encoding="utf-8-sig", newline="") as file:
        if task.csv_quotes:
            yield from _quoted_fields(path, file)
            return
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            for fields in reader:
                if fields:
                    yield reader.line_num, fields, ""
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}") from error


def _quoted_fields(path: Path, file: TextIO) -> Iterator[tuple[int, list[str], str]]:
    """The same for fields that may be quoted, and may then contain line ends.

    An unclosed quote would swallow the rows up to the next quote, which shows as a field with both line ends and tabs.
    Then only the line itself is spoiled, and the next line begins a new row.
    """
    try:
        lines = list(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    start = 0
    while start < len(lines):
        reader = csv.reader((lines[place] for place in range(start, len(lines))), delimiter="\t")
        try:
            fields, flaw = next(reader), ""
            if any("\t" in field and ("\n" in field or "\r" in field) for field in fields):
                flaw = "an unclosed quote"
        except csv.Error as error:
            fields, flaw = [], f"an unclosed quote, or {error}"
        if fields or flaw:
            yield start + 1, fields, flaw
        start += 1 if flaw else reader.line_num


def _label(task: Task, text: str, where: str) -> float | int:
    if not task.is_regression:
        if text in task.labels:
            return task.labels.index(text)
        raise ValueError(f"{where}: label {text!r}: must be one of {', '.join(task.labels)}")
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 5:
        raise ValueError(f"{where}: score {text!r}: must be a number from 0 to 5")
    return score
