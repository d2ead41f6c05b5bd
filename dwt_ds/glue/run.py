"""Score a checkpoint: all (task, seed) pairs that are not done yet, then results.json.

The result of each finished pair is a file of its own, so that no pair is run twice.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dwt_ds.base.files import read_json, write_json
from dwt_ds.base.locks import FolderLock
from dwt_ds.base.trees import differences
from dwt_ds.base.words import one_line
from dwt_ds.glue.checkpoint import Checkpoint
from dwt_ds.glue.devices import spread, visible_gpus
from dwt_ds.glue.finetune import fine_tune
from dwt_ds.glue.options import FineTuning, GlueOptions
from dwt_ds.glue.reading import REPOSITORY, TaskData, read_task
from dwt_ds.glue.scores import MADE_WITH, Pair, summarize
from dwt_ds.glue.tasks import Task, find_task, find_tasks

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "scikit-learn", "scipy")


def score_checkpoint(options: GlueOptions) -> dict[str, Any]:
    """Fine-tune and score, with a printed line a pair; pairs that have a result in `out` are not run again.

    Returns:
        What results.json holds: `summarize`'s parts, model, settings, seeds, versions, and the pairs that `failed`.

    Raises:
        FileNotFoundError, ValueError: model, data, or earlier results in `out` are not what they should be. All is
            read and checked before the first pair starts.
    """
    if options.settings.precision == "bf16" and not visible_gpus():
        raise ValueError("--precision=bf16: there is no GPU; use fp32")
    checkpoint = Checkpoint.open(options.model)
    settings = replace(options.settings, max_length=checkpoint.row_length(options.settings.max_length))
    options = replace(options, settings=settings)
    tasks = find_tasks(options.tasks, "--tasks")
    made_with = {}
    for task in tasks:
        data = _read(task, options.glue_dir)
        made_with[task.name] = _made_with(checkpoint, task, data, settings)
        for split in (data.train, *data.validation):
            if split.left_out:
                rows = split.left_out + len(split.rows)
                print(f"{task.name}, {split.file}: {split.left_out} of {rows:,} rows left out (a stray tab or quote)")

    with FolderLock(options.out, f"--out {options.out}"):
        return _score(options, checkpoint, tasks, made_with)


def _score(
    options: GlueOptions, checkpoint: Checkpoint, tasks: list[Task], made_with: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The pairs that are not done yet, then results.json; `made_with` has all that each task's results depend on."""
    summary = options.out / "results.json"
    if summary.is_file() and not _is_summary(summary):
        raise ValueError(f"--out {options.out}: {summary} is not a result of dwt-ds glue; rename it")
    pairs: list[Pair] = [(task.name, seed) for task in tasks for seed in range(options.seeds)]
    found = {pair: _finished(_file_of(options.out, pair), made_with[pair[0]]) for pair in pairs}
    results = {pair: result for pair, result in found.items() if result is not None}
    waiting = [pair for pair in pairs if pair not in results]
    if results:
        print(f"{len(results)} of {len(pairs)} fine-tunings are finished already")
    if waiting:
        checkpoint.classifier(tasks[0])  # a model that cannot be fine-tuned fails here, once

    failed = []
    gpus = visible_gpus()
    jobs = [(options, *pair) for pair in waiting]
    for index, outcome in spread(_run_pair, jobs, gpus):
        name, seed = waiting[index]
        if isinstance(outcome, Exception):
            if not isinstance(outcome, (ValueError, OSError)):
                traceback.print_exception(outcome, file=sys.stderr)
            failed.append({"task": name, "seed": seed, "error": one_line(outcome)})
            print(f"{name}, seed {seed}: failed: {one_line(outcome)}")
            continue
        results[name, seed] = {**outcome, MADE_WITH: made_with[name]}
        file = _file_of(options.out, (name, seed))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, results[name, seed])
        print(f"{name}, seed {seed}: {outcome['score']:.2f} ({outcome['seconds']:.0f} s)")

    content = {
        "model": options.model,
        "model_identity": checkpoint.identity,
        "glue": REPOSITORY if options.glue_dir is None else str(options.glue_dir),
        "unit": "points: 100 x the metric",
        "seeds": list(range(options.seeds)),
        "settings": asdict(options.settings),
        **summarize(tasks, range(options.seeds), results),
        "failed": failed,
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    write_json(summary, content)
    return content


def _is_summary(file: Path) -> bool:
    try:
        return "mean_of_seven" in read_json(file)
    except ValueError:
        return False


def _file_of(out: Path, pair: Pair) -> Path:
    name, seed = pair
    return out / "pairs" / name / f"seed_{seed}.json"


def _finished(file: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """A pair's result; None if it has not been run.

    Raises ValueError, which says what differs, if it was made with something other than `made_with`.
    """
    if not file.is_file():
        return None
    try:
        result = read_json(file)
        different = differences(result[MADE_WITH], made_with)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: not a result of dwt-ds glue; delete it to run this pair again") from error
    if different:
        name, then, now = different[0]
        raise ValueError(f"{file} was made with {name} = {then}, now it is {now}; choose another --out")
    return result


def _run_pair(options: GlueOptions, name: str, seed: int) -> dict[str, Any]:
    task = find_task(name, "--tasks")
    return fine_tune(Checkpoint.open(options.model), task, _read(task, options.glue_dir), seed, options.settings)


# A job is one pair, and the pairs of a task follow one another.
_read = lru_cache(maxsize=1)(read_task)


def _made_with(checkpoint: Checkpoint, task: Task, data: TaskData, settings: FineTuning) -> dict[str, Any]:
    return {
        "model": checkpoint.identity,
        **asdict(settings),
        "epochs": settings.epochs or task.epochs,
        "train": data.train.facts(),
        "validation": [split.facts() for split in data.validation],
    }
