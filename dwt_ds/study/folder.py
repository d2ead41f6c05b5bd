"""The folder of a study: a folder per run, and the records that the report needs.

OUT/RUN/            what dwt_ds.pretrain writes
OUT/recipes/RUN.yaml, OUT/logs/RUN.log
OUT/GRID.json       a grid's runs with their labels and how they ended

Grids may share a folder, and then share the runs that they have in common. `check_same` refuses a run that was made
with other settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dwt_ds.base.files import make_folder, read_json, write_json
from dwt_ds.base.run_files import DS_JSON, IDENTITY, RECIPE
from dwt_ds.base.trees import flatten, get_place, merge
from dwt_ds.base.yaml_and_json import is_dump, read_yaml, yaml_text
from dwt_ds.config.schema import RunConfig
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.resolve import Resolved
from dwt_ds.study.grid import EVAL_SETS, Grid, StudyRun

# Settings that do not affect what is learned, so they may change between two starts of a run.
_MAY_CHANGE = (
    "output_dir",
    "data.workers",
    # Their product with the number of ranks, the global batch, is compared.
    "train.micro_batch_size",
    "train.gradient_accumulation_steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.export_every",
    "train.collective_timeout_seconds",
    "train.report_stuck_after_seconds",
    "train.expected_world_size",
)
# Without a teacher there is no soft loss, and these are not compared.
_SOFT_LOSS_SETTINGS = (
    "distill.soft_weight",
    "distill.soft_positions",
    "distill.temperature",
    "distill.hidden_weight",
    "distill.hidden_layer",
)
# Sections of the DeepSpeed JSON that affect what is learned. A user may have edited the file since.
_COMPARED_SECTIONS = ("optimizer", "scheduler", "bf16", "fp16")


class StudyFolder:
    """Paths and files of a study."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.path / name)

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def recipe(self, name: str) -> Path:
        return self.path / "recipes" / f"{name}.yaml"

    def check_contents(self, grid: Grid) -> None:
        """Raises ValueError if the study would overwrite a file that no study wrote."""
        record = self.path / f"{grid.name}.json"
        foreign = [record] if record.is_file() and not _is_a_record(record) else []
        recipes = [self.recipe(run.name) for run in grid.runs]
        foreign += [recipe for recipe in recipes if recipe.is_file() and not is_dump(recipe.read_bytes())]
        if foreign:
            raise ValueError(
                f"--out {self.path}: the study would replace {foreign[0]}; rename it, or choose another --out"
            )

    def is_finished(self, name: str) -> bool:
        return self.run(name).finished_steps() > 0

    def write_recipe(self, run: StudyRun, path: Path) -> Path:
        """Write the run's recipe for `dwt_ds.pretrain` to `path`; returns `path`."""
        settings = {**run.settings, "output_dir": str(self.path / run.name), "seed": run.seed}
        teacher = None if run.teacher_run is None else str(self.run(run.teacher_run).export)
        settings["teacher"] = {**settings.get("teacher", {}), "path": teacher}
        make_folder(path.parent)
        path.write_text(yaml_text(settings), encoding="utf-8")
        return path

    def write_grid(self, grid: Grid, status: Mapping[str, str]) -> None:
        """Record the grid and how its runs ended, beside the grid's runs of other seeds that were recorded before."""
        content, path = asdict(grid), self.path / f"{grid.name}.json"
        for run in content["runs"]:
            del run["settings"], run["set_by"]  # in its recipe
            run["status"] = status.get(run["name"], "waiting")
        names = {run.name for run in grid.runs}
        earlier = [run for run in read_json(path)["runs"] if run["name"] not in names] if path.is_file() else []
        content["runs"] = [run for run in earlier if (self.path / run["name"]).is_dir()] + content["runs"]
        make_folder(self.path)
        write_json(path, content)

    def grids(self) -> list[dict[str, Any]]:
        """What `write_grid` recorded, sorted by name; other JSON files in the folder are ignored."""
        return [read_json(path) for path in sorted(self.path.glob("*.json")) if _is_a_record(path)]


def _is_a_record(file: Path) -> bool:
    """Whether `write_grid` may have written it."""
    try:
        return all("status" in run for run in read_json(file)["runs"])
    except (ValueError, KeyError, TypeError):
        return False


def check_same(folder: Path, settings: Resolved) -> None:
    """Raises ValueError if the run in `folder` has other settings, another global batch or other data than the study's.

    The folder may be empty or missing.
    """
    config = folder / RECIPE
    if not config.is_file():
        return
    # An older version may lack a setting; it behaved as today's default does.
    stored = merge(RunConfig().to_dict(), read_yaml(config, "settings"))
    ds_values, identity = (RunFolder(folder).read(name) or {} for name in (DS_JSON, IDENTITY))
    for what, theirs, ours in _to_compare(stored, ds_values, identity, settings):
        if theirs != ours:
            raise ValueError(
                f"{folder}: was made with {what}={theirs!r}, this study has {ours!r}; "
                "choose another --out or delete that run"
            )


def _to_compare(
    stored: Mapping[str, Any], ds_values: Mapping[str, Any], identity: Mapping[str, Any], settings: Resolved
) -> Iterator[tuple[str, Any, Any]]:
    """(name, value in the folder, value in the study) of everything that must be equal, where both are known."""
    here, fingerprint = merge(RunConfig().to_dict(), settings.to_recipe()), settings.corpus.fingerprint
    passed_over = [*_MAY_CHANGE, EVAL_SETS]
    # Sets may be added and removed, but a name must always mean the same text.
    theirs, ours = (get_place(tree, EVAL_SETS) or {} for tree in (stored, here))
    for name in theirs:
        if name in ours:
            yield f"{EVAL_SETS}.{name}", theirs[name], ours[name]
    if fingerprint and "data" in identity:
        passed_over.append("data.dir")  # compared by content, not by name
        yield "data.dir's fingerprint", identity["data"], fingerprint
    for key in flatten(RunConfig().to_dict()):
        unused = settings.config.teacher.path is None and key.startswith(_SOFT_LOSS_SETTINGS)
        if key not in passed_over and not unused:
            yield key, _at(stored, key), _at(here, key)
    if "train_batch_size" in ds_values:
        yield "train_batch_size", ds_values["train_batch_size"], settings.rows_per_step
    if fingerprint and ds_values:  # without the data, the scheduler's number of steps is a guess
        theirs, ours = _what_is_learned(ds_values), _what_is_learned(settings.ds_values)
        for key in theirs | ours:
            yield key, theirs.get(key), ours.get(key)


def _what_is_learned(ds_values: Mapping[str, Any]) -> dict[str, Any]:
    return flatten({section: ds_values[section] for section in _COMPARED_SECTIONS if section in ds_values})


def _at(values: Mapping[str, Any], key: str) -> Any:
    value = get_place(values, key)
    # Only RUN/export is compared: the study may have moved, or be given by another path.
    return "/".join(Path(value).parts[-2:]) if key == "teacher.path" and value else value
