"""Fine-tuned scores of a run's exports: those kept along the pre-training, and the last."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dwt_ds.glue.tasks import SEVEN
from dwt_ds.launch.supervise import run_logged
from dwt_ds.run.folder import RunFolder

HUB = "hub"
# Keys of a grid's `glue` section, which are options of `dwt-ds glue`; `dir` may be HUB, that command's default.
GLUE_KEYS = (
    "dir",
    "tasks",
    "seeds",
    "learning_rate",
    "batch_size",
    "epochs",
    "max_length",
    "max_train_rows",
    "max_steps",
    "precision",
    "quantize",
)
FOLDER = "glue"
# Of `dwt-ds glue`, where the grid names none.
_SEEDS = 3


def exports(run: RunFolder) -> Iterator[tuple[int, Path]]:
    """(optimizer step, Hugging Face folder) of a finished run's exports, the earliest first."""
    for folder in sorted(run.export.glob("step_*")):
        yield int(folder.name.removeprefix("step_")), folder
    yield run.finished_steps(), run.export


def score_exports(run: RunFolder, glue: Mapping[str, Any], log: Path) -> int:
    """Fine-tune every export of `run` as the grid's `glue` section says; the first exit code that is not 0, or 0.

    Results go to RUN/glue/step_XXXXXXXX/results.json; what lies there is not run again.
    """
    worst = 0
    for step, folder in exports(run):
        worst = run_logged(glue_command(folder, _results(run, step).parent, glue), log) or worst
    return worst


def exports_without_results(run: RunFolder, steps: int, export_every: int) -> int:
    """Exports of a run that have not been fine-tuned yet; of an unfinished run, those that it is going to make.

    Args:
        steps: optimizer steps of the whole run.
        export_every: optimizer steps between the exports along the way; 0: none.
    """
    if run.finished_steps():
        made = [step for step, _ in exports(run)]
    else:
        made = [*(range(export_every, steps, export_every) if export_every else ()), steps]
    return sum(not _results(run, step).is_file() for step in made)


def fine_tunings_each(glue: Mapping[str, Any]) -> tuple[int, int]:
    """(tasks, seeds) that every export is fine-tuned on."""
    tasks = glue.get("tasks", SEVEN)
    return len(tasks.split(",") if isinstance(tasks, str) else tasks), int(glue.get("seeds", _SEEDS))


def _results(run: RunFolder, step: int) -> Path:
    return run.path / FOLDER / f"step_{step:08d}" / "results.json"


def glue_command(model: Path, out: Path, glue: Mapping[str, Any]) -> list[str]:
    """`dwt-ds glue` with the grid's options."""
    options = []
    for key, value in glue.items():
        if key == "dir" and value == HUB:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        options += ["--glue-dir" if key == "dir" else f"--{key.replace('_', '-')}", text]
    return [sys.executable, "-m", "dwt_ds.cli.main", "glue", "--model", str(model), "--out", str(out), *options]
