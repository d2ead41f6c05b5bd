"""A study's folder: its runs, each in a folder of its own, and what the report needs to know of them.

OUT/RUN/            what dwt_ds.pretrain writes
OUT/recipes/RUN.yaml, OUT/logs/RUN.log
OUT/GRID.json       a grid's runs with their labels and how they ended

Several grids may share one folder, and then share the runs they have in common.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dwt_ds.base.files import atomic_file
from dwt_ds.run.folder import RunFolder
from dwt_ds.study.grid import Grid, StudyRun


class StudyFolder:
    """Paths and files of a study."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, name: str) -> RunFolder:
        """Folder of the run `name`."""
        return RunFolder(str(self.path / name))

    def log(self, name: str) -> Path:
        """What the run printed."""
        return self.path / "logs" / f"{name}.log"

    def recipe(self, name: str) -> Path:
        """The run's recipe."""
        return self.path / "recipes" / f"{name}.yaml"

    def is_finished(self, name: str) -> bool:
        """Whether the run is complete."""
        return self.run(name).finished_steps() > 0

    def write_recipe(self, run: StudyRun, path: Path) -> Path:
        """Write the run's recipe, which `dwt_ds.pretrain` takes, to `path`, and return that."""
        settings = {**run.settings, "output_dir": str(self.path / run.name), "seed": run.seed}
        teacher = None if run.teacher_run is None else str(self.run(run.teacher_run).export)
        settings["teacher"] = {**settings.get("teacher", {}), "path": teacher}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return path

    def write_grid(self, grid: Grid, status: Mapping[str, str]) -> None:
        """Record the grid and how its runs ended."""
        runs = [
            {
                "name": run.name,
                "seed": run.seed,
                "labels": run.labels,
                "teacher_run": run.teacher_run,
                "status": status.get(run.name, "waiting"),
            }
            for run in grid.runs
        ]
        content = {key: value for key, value in asdict(grid).items() if key != "runs"}
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path / f"{grid.name}.json") as file:
            file.write((json.dumps({**content, "runs": runs}, indent=1) + "\n").encode())

    def grids(self) -> list[dict[str, Any]]:
        """What `write_grid` recorded, by name."""
        found = []
        for path in sorted(self.path.glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "runs" in content:
                found.append(content)
        return found
