"""A study from its first run to its last: what is finished is passed over, what fails does not stop the others."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dwt_ds.base.words import table
from dwt_ds.config.recipe import load_recipe
from dwt_ds.data.manifest import read_manifest
from dwt_ds.launch.local import pretrain_command, visible_ranks
from dwt_ds.launch.supervise import STOPPED, run_logged
from dwt_ds.plan.hardware import find_device
from dwt_ds.plan.settings import Settings, settle
from dwt_ds.study.estimate import Cost, estimate
from dwt_ds.study.folder import StudyFolder
from dwt_ds.study.grid import Grid, StudyRun, load_grid
from dwt_ds.study.read_run import held_out_rows
from dwt_ds.study.same_run import check_same
from dwt_ds.study.scores import GLUE_KEYS, HUB, exports_without_results, fine_tunings_each, score_exports

FINISHED, WAITING = "finished", "waiting"
# Decided by the study itself.
_NOT_OVERRIDDEN = ("output_dir", "seed", "teacher.path")


@dataclass(frozen=True)
class StudyOptions:
    """What `dwt-ds study` was asked for."""

    grid: str
    scale: str = "smoke"
    out: Path | None = None
    """None: runs/study/SCALE."""
    seeds: tuple[int, ...] = ()
    """Empty: the grid's."""
    ranks: int | None = None
    """Processes of a run; None: one a GPU, or the scale's."""
    gpu: str | None = None
    """Device of the estimate; None: cpu, or a100-80 where there is a GPU and for the paper's scale."""
    glue: str | None = None
    """Fine-tune all exports on GLUE from this folder, or from the "hub"; None: only if the grid says so."""
    overrides: tuple[str, ...] = ()
    """`key=value` for all runs."""


@dataclass(frozen=True)
class Study:
    """A grid with its folder and recipes, checked."""

    grid: Grid
    folder: StudyFolder
    ranks: int
    overrides: tuple[str, ...]
    settings: dict[str, Settings]
    """Of each run, by name."""
    costs: dict[str, Cost]

    @classmethod
    def open(cls, options: StudyOptions) -> Study:
        """Read and check everything before the first run; nothing is written.

        Raises:
            ValueError, OSError: the first mistake, in one line.
        """
        for override in options.overrides:
            key = override.partition("=")[0]
            if key in _NOT_OVERRIDDEN:
                raise ValueError(f"override {override!r}: the study sets {key} itself; use --out or --seeds, say")
        grid = load_grid(options.grid, options.scale, options.seeds, options.glue)
        glue = grid.glue or {}
        for key in glue:
            if key not in GLUE_KEYS:
                raise ValueError(f"grid {options.grid}: glue.{key}: unknown key (known: {', '.join(GLUE_KEYS)})")
        tasks = glue.get("dir", HUB)
        if tasks != HUB and not Path(tasks).is_dir():
            raise FileNotFoundError(f"GLUE folder {tasks!r}: no such folder; give one with GLUE's TSVs, or {HUB}")
        folder = StudyFolder(options.out or Path("runs") / "study" / grid.scale)
        ranks = options.ranks or visible_ranks(grid.ranks)
        on_gpu = grid.scale == "paper" or torch.cuda.is_available()
        device = find_device(options.gpu or ("a100-80" if on_gpu else "cpu"), ranks)
        settings = {}
        with tempfile.TemporaryDirectory() as temporary:
            drafts = Path(temporary)
            for run in grid.runs:
                recipe = folder.write_recipe(run, drafts / f"{run.name}.yaml")
                settings[run.name] = settle(str(recipe), list(options.overrides), None, ranks)
        for run in grid.runs:
            check_same(folder.path / run.name, settings[run.name])
        costs = estimate(grid.runs, settings, device)
        return cls(grid, folder, ranks, options.overrides, settings, costs)

    def check_data(self) -> None:
        """Whether the data of the runs that are not finished are there.

        Raises:
            FileNotFoundError: they are not; one line.
        """
        for run in self._due():
            data = self.settings[run.name].config.data.dir
            if data == load_recipe("quickstart").config.data.dir and not Path(data).is_dir():
                raise FileNotFoundError(
                    f"data.dir={data!r}: no such folder; run dwt-ds prepare --docs --train-tokenizer 8000 "
                    f"--seq-len 128 --out {data}, or make quickstart"
                )
            read_manifest(Path(data).expanduser())

    def plan_table(self) -> str:
        """Runs, steps, tokens and hours, for people."""
        rows: list[tuple[str, ...]] = [("run", "steps", "tokens", "PFLOP", "hours")]
        rows += [(run.name, *_cells(self.costs[run.name]), self._status(run)) for run in self.grid.runs]
        due = [self.costs[run.name] for run in self._due()]
        total = Cost(*(sum(getattr(cost, key) for cost in due) for key in ("steps", "tokens", "flops", "hours")))
        rows.append((f"{len(due)} to run", *_cells(total)))
        return "\n".join([*table(rows, "<>>>><"), *self._fine_tunings(), *self._assumptions()])

    def _due(self) -> list[StudyRun]:
        return [run for run in self.grid.runs if not self.folder.is_finished(run.name)]

    def _fine_tunings(self) -> list[str]:
        if self.grid.glue is None:
            return []
        (tasks, seeds), exports = fine_tunings_each(self.grid.glue), 0
        for name, settings in self.settings.items():
            every = settings.config.train.export_every
            exports += exports_without_results(self.folder.run(name), settings.total_steps, every)
        each = f"{exports} exports x {tasks} tasks x {seeds} seeds"
        return [f"plus {exports * tasks * seeds:,} fine-tunings ({each}), not in the hours"]

    def _assumptions(self) -> list[str]:
        corpora = dict.fromkeys(settings.corpus for settings in self.settings.values())
        return [f"data: {corpus.source}" for corpus in corpora if corpus.fingerprint is None]

    def _status(self, run: StudyRun) -> str:
        return FINISHED if self.folder.is_finished(run.name) else ""

    def run(self, tell: Callable[[str], None] = print) -> dict[str, str]:
        """Run what is not finished, teachers first; how each run ended, by name.

        Raises:
            KeyboardInterrupt: after the run in progress has saved and ended.
        """
        status = {run.name: self._status(run) or WAITING for run in self.grid.runs}
        self.folder.write_grid(self.grid, status)
        for number, run in enumerate(self.grid.runs, start=1):
            tell(f"[{number}/{len(self.grid.runs)}] {run.name}")
            status[run.name] = self._run_one(run, tell)
            self.folder.write_grid(self.grid, status)
            tell(f"    {status[run.name]}{self._held_out(run)}")
        return status

    def _run_one(self, run: StudyRun, tell: Callable[[str], None]) -> str:
        if run.teacher_run is not None and not self.folder.is_finished(run.teacher_run):
            return f"skipped: its teacher {run.teacher_run} is not there"
        log = self.folder.log(run.name)
        if not self.folder.is_finished(run.name):
            recipe = self.folder.write_recipe(run, self.folder.recipe(run.name))
            command = pretrain_command(recipe, self.overrides, self.ranks)
            tell(f"    $ {shlex.join(command)}")
            began = time.monotonic()
            code = run_logged(command, log)
            if code == STOPPED:
                raise KeyboardInterrupt
            if code != 0:
                return f"failed with exit code {code} after {time.monotonic() - began:.0f} s; see {log}"
        if self.grid.glue is not None:
            code = score_exports(self.folder.run(run.name), self.grid.glue, log)
            if code != 0:
                return f"pre-trained, but its fine-tuning failed with exit code {code}; see {log}"
        return FINISHED

    def _held_out(self, run: StudyRun) -> str:
        rows = held_out_rows(self.folder.path / run.name)
        return f", held-out MLM loss {rows[-1]['eval_hard_loss']:.4f} at step {rows[-1]['step']}" if rows else ""


def run_study(options: StudyOptions, *, dry_run: bool, tell: Callable[[str], None] = print) -> int:
    """The study, or only its plan; exit code 0 if all runs are finished, 1 if not, 130 if it was interrupted."""
    study = Study.open(options)
    if not dry_run:
        study.check_data()
    tell(f"{study.grid.title}: {len(study.grid.runs)} runs in {study.folder.path}, {study.ranks} ranks each\n")
    tell(study.plan_table())
    if dry_run:
        return 0
    tell("")
    try:
        status = study.run(tell)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    unfinished = {name: how for name, how in status.items() if how != FINISHED}
    tell(f"\n{len(status) - len(unfinished)} of {len(status)} runs are finished")
    for name, how in unfinished.items():
        tell(f"{name}: {how}")
    tell(f"report: dwt-ds report {study.folder.path}")
    return 1 if unfinished else 0


def _cells(cost: Cost) -> tuple[str, ...]:
    return f"{cost.steps:,}", _short(cost.tokens), f"{cost.flops / 1e15:,.3g}", f"{cost.hours:,.2f}"


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:.0f}"
