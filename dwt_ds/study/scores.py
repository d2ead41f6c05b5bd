"""Fine-tuned scores of a run's exports, those along the pre-training and the last: `dwt-ds glue` makes them.

RUN/glue/step_XXXXXXXX/results.json
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from dwt_ds.base.files import read_json
from dwt_ds.base.processes import own_command, path_argument
from dwt_ds.config.validate import must_be, own_message
from dwt_ds.glue.options import FineTuning, GlueOptions
from dwt_ds.glue.tasks import SEVEN
from dwt_ds.launch.commands import run_logged
from dwt_ds.run.folder import RunFolder

TaskScores = Mapping[str, Mapping[str, float]]
"""Task -> fine-tuning seed -> score in points."""
HUB = "hub"
# Keys of a grid's `glue` section, which are options of `dwt-ds glue`; `dir` may be HUB, that command's default.
GLUE_KEYS = ("dir", "tasks", "seeds", *(field.name for field in fields(FineTuning)))
_FOLDER, _RESULTS = "glue", "results.json"


def score_exports(run: RunFolder, glue: Mapping[str, Any], log: Path, stop: threading.Event) -> int:
    """Fine-tune every export of `run` as the grid's `glue` section says; the last exit code that is not 0, or 0.

    Fine-tunings that have their results are not repeated. Once `stop` is set, the one in progress is ended, and no
    other is started.
    """
    worst = 0
    for step, export in exports(run):
        if not stop.is_set():
            worst = run_logged(glue_command(export, _results(run, step).parent, glue), log, stop) or worst
    return worst


def exports(run: RunFolder) -> Iterator[tuple[int, Path]]:
    """(optimizer step, Hugging Face folder) of a finished run's exports, the earliest first."""
    for folder in sorted(run.export.glob("step_*")):
        yield _step(folder), folder
    yield run.finished_steps(), run.export


def exports_without_results(run: RunFolder, steps: int, export_every: int) -> int:
    """How many exports of a run of `steps` are still to be fine-tuned, including those that it has yet to make."""
    if run.finished_steps():
        made = [step for step, _ in exports(run)]
    else:
        made = [*(range(export_every, steps, export_every) if export_every else ()), steps]
    return sum(not _results(run, step).is_file() for step in made)


def check_glue(where: str, glue: Mapping[str, Any]) -> GlueOptions:
    """The options of `dwt-ds glue` in a grid's `glue` section, without model and folders.

    Raises ValueError, in one line, for an unknown key or a value that the command would refuse.
    """
    for key in glue:
        if key not in GLUE_KEYS:
            raise ValueError(f"{where}.{key}: unknown key (known: {', '.join(GLUE_KEYS)})")
    settings = {key: value for key, value in glue.items() if key not in ("dir", "tasks", "seeds")}
    tasks: Any = glue.get("tasks", SEVEN)
    tasks = tasks.split(",") if isinstance(tasks, str) else tasks
    seeds = glue.get("seeds", GlueOptions.seeds)
    try:
        return GlueOptions("", Path(), tasks=tasks, seeds=seeds, settings=FineTuning(**settings))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            raise ValueError(f"{where}: {own_message(first)}") from None
        raise ValueError(f"{where}.{first['loc'][0]}={first['input']!r}: must be {must_be(first)}") from None


def glue_command(model: Path, out: Path, glue: Mapping[str, Any]) -> list[str]:
    """`dwt-ds glue` with the grid's options."""
    options = []
    for key, value in glue.items():
        if value is None or (key == "dir" and value == HUB):
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        options += ["--glue-dir", path_argument(text)] if key == "dir" else [f"--{key.replace('_', '-')}", text]
    return own_command("glue", "--model", path_argument(model), "--out", path_argument(out), *options)


def scores_by_step(run: RunFolder) -> dict[int, TaskScores]:
    """Optimizer step of an export -> its scores on those of the seven tasks that it was fine-tuned on."""
    found: dict[int, TaskScores] = {}
    for path in sorted((run.path / _FOLDER).glob(f"step_*/{_RESULTS}")):
        tasks = read_json(path)["tasks"]
        found[_step(path.parent)] = {name: task["score"]["by_seed"] for name, task in tasks.items() if name in SEVEN}
    return found


def mean_scores(scores: TaskScores, tasks: Collection[str]) -> list[float]:
    """The mean of `tasks` for each fine-tuning seed that has them all, in points."""
    seeds = sorted(set.intersection(*(set(scores.get(task, ())) for task in tasks))) if tasks else []
    return [fmean(scores[task][seed] for task in tasks) for seed in seeds]


def tasks_in_words(tasks: Collection[str]) -> str:
    """What `mean_scores` are means of."""
    return "mean of 7 tasks" if len(tasks) == len(SEVEN) else ", ".join(tasks)


def _results(run: RunFolder, step: int) -> Path:
    return run.path / _FOLDER / f"step_{step:08d}" / _RESULTS


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
