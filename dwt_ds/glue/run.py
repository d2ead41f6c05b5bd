"""Score a checkpoint: all (task, seed) pairs that are not done yet, then results.json."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dwt_ds.base.files import atomic_file
from dwt_ds.base.words import one_line
from dwt_ds.glue import hub, local_files
from dwt_ds.glue.checkpoint import Checkpoint
from dwt_ds.glue.devices import spread, visible_gpus
from dwt_ds.glue.finetune import fine_tune
from dwt_ds.glue.finished import MADE_WITH, FinishedPairs
from dwt_ds.glue.results import Pair, summarize
from dwt_ds.glue.settings import FineTuning
from dwt_ds.glue.splits import TaskData
from dwt_ds.glue.tasks import SEVEN, Task, find_task, find_tasks

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "scikit-learn", "scipy")


@dataclass(frozen=True)
class GlueOptions:
    """What `dwt-ds glue` was asked for."""

    model: str
    """A Hugging Face folder with its tokenizer, or a name on the hub."""
    out: Path
    glue_dir: Path | None = None
    """A folder of TSVs; None: `nyu-mll/glue` on the hub."""
    tasks: tuple[str, ...] = SEVEN
    seeds: int = 3
    """Seeds 0 to this - 1."""
    settings: FineTuning = field(default_factory=FineTuning)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds is {self.seeds}: it must be 1 or more")
        if not find_tasks(self.tasks, "--tasks"):
            raise ValueError("--tasks is empty: name some, such as CoLA,SST-2")


def score_checkpoint(options: GlueOptions, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Fine-tune and score; pairs whose result lies in `out` already are taken from there.

    Args:
        tell: where lines about the progress go.

    Returns:
        What results.json holds: `summarize`'s parts, model, settings, seeds, versions, and the pairs that `failed`.

    Raises:
        FileNotFoundError, ValueError: model, data, or earlier results in `out` are not what they should be. All is
            read and checked before the first pair starts.
    """
    gpus = visible_gpus()
    if options.settings.precision == "bf16" and not gpus:
        raise ValueError("--precision is bf16: there is no GPU to do it; use fp32")
    checkpoint = Checkpoint.open(options.model)
    settings = replace(options.settings, max_length=checkpoint.row_length(options.settings.max_length))
    options = replace(options, settings=settings)
    tasks = find_tasks(options.tasks, "--tasks")
    made_with = {task.name: _made_with(checkpoint, task, _read(options.glue_dir, task), settings) for task in tasks}

    finished = FinishedPairs(options.out)
    pairs: list[Pair] = [(task.name, seed) for task in tasks for seed in range(options.seeds)]
    found = {pair: finished.read(*pair, made_with[pair[0]]) for pair in pairs}
    results = {pair: result for pair, result in found.items() if result is not None}
    waiting = [pair for pair in pairs if pair not in results]
    if results:
        tell(f"{len(results)} of {len(pairs)} fine-tunings are done already")
    if waiting:
        checkpoint.classifier(tasks[0])  # a model that cannot be fine-tuned shows here, once

    failed = []
    jobs = [(options, *pair) for pair in waiting]
    for index, outcome in spread(_run_pair, jobs, gpus):
        name, seed = waiting[index]
        if isinstance(outcome, Exception):
            failed.append({"task": name, "seed": seed, "error": _one_line(outcome)})
            tell(f"{name}, seed {seed}: failed: {_one_line(outcome)}")
            continue
        finished.write(name, seed, made_with[name], outcome)
        results[name, seed] = {**outcome, MADE_WITH: made_with[name]}
        tell(f"{name}, seed {seed}: {outcome['score']:.2f} ({outcome['seconds']:.0f} s)")

    content = {
        "model": options.model,
        "model_identity": checkpoint.identity,
        "glue": hub.REPOSITORY if options.glue_dir is None else str(options.glue_dir),
        "unit": "points: 100 x the metric",
        "seeds": list(range(options.seeds)),
        "settings": settings.as_dict(),
        **summarize(tasks, range(options.seeds), results),
        "failed": failed,
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic_file(options.out / "results.json") as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    return content


def _run_pair(options: GlueOptions, name: str, seed: int) -> dict[str, Any]:
    task = find_task(name, "--tasks")
    return fine_tune(Checkpoint.open(options.model), task, _read(options.glue_dir, task), seed, options.settings)


@lru_cache(maxsize=1)
def _read(glue_dir: Path | None, task: Task) -> TaskData:
    return hub.read_task(task) if glue_dir is None else local_files.read_task(glue_dir, task)


def _made_with(checkpoint: Checkpoint, task: Task, data: TaskData, settings: FineTuning) -> dict[str, Any]:
    return {
        "model": checkpoint.identity,
        **settings.as_dict(),
        "epochs": settings.epochs or task.epochs,
        "train": data.train.facts(),
        "validation": [split.facts() for split in data.validation],
    }


def _one_line(error: Exception) -> str:
    if not isinstance(error, (ValueError, OSError)):
        traceback.print_exception(error, file=sys.stderr)
    return one_line(error)
