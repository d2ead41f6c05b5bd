"""Runs a study: skips finished runs, starts a student once its teacher is finished, goes on after a failed run.

Each run is a process; `at_once` of them run at a time.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from dwt_ds.base.gpus import gpu_count
from dwt_ds.base.locks import FolderLock
from dwt_ds.base.trees import is_within
from dwt_ds.base.words import counted, prefix_errors
from dwt_ds.data.manifest import read_data_manifest
from dwt_ds.distill.metrics_keys import EVAL_LOSS
from dwt_ds.glue.options import check_packages
from dwt_ds.launch.commands import run_logged, stop_on_signals
from dwt_ds.launch.local import pretrain_command
from dwt_ds.launch.supervise import STOPPED
from dwt_ds.plan.hardware import Device, find_device
from dwt_ds.plan.settings import resolve_plan
from dwt_ds.run.resolve import Resolved
from dwt_ds.study.estimate import Cost, cost_table, estimate
from dwt_ds.study.folder import StudyFolder, check_same
from dwt_ds.study.grid import Grid, Scale, StudyRun, key_of, load_grid
from dwt_ds.study.progress import StudyProgress
from dwt_ds.study.records import RunRecord
from dwt_ds.study.scores import HUB, check_glue, exports_without_results, score_exports

FINISHED, WAITING = "finished", "waiting"
# Set by the study itself.
_NOT_OVERRIDDEN = ("output_dir", "seed", "teacher.path")
_print = partial(print, flush=True)


@dataclass(frozen=True)
class StudyOptions:
    """Options of `dwt-ds study`."""

    grid: str
    scale: Scale = "smoke"
    out: Path | None = None
    """None: `default_folder`."""
    seeds: tuple[int, ...] = ()
    """Empty: the grid's."""
    ranks: int | None = None
    """Ranks per run; None: the scale's."""
    at_once: int = 1
    """Runs at a time."""
    gpu: str | None = None
    """Device of the estimate; None: a100-80 with a GPU and for the scales gpu and paper, else cpu."""
    glue: str | None = None
    """Fine-tune all exports on GLUE from this folder, or from the "hub"; None: only if the grid says so."""
    overrides: tuple[str, ...] = ()
    """`key=value` for all runs."""


@dataclass(frozen=True)
class Study:
    """A grid that has been checked, with its folder and the resolved settings of its runs."""

    grid: Grid
    folder: StudyFolder
    ranks: int
    at_once: int
    overrides: tuple[str, ...]
    settings: dict[str, Resolved]
    """Of each run, by name."""
    device: Device
    """Of a rank."""

    @classmethod
    def open(cls, options: StudyOptions) -> Study:
        """Read and check settings and folders before the first run; nothing is written.

        Raises ValueError or OSError, in one line, for the first mistake.
        """
        grid = load_grid(options.grid, options.scale, options.seeds, options.glue)
        for override in options.overrides:
            _check_override(grid, override)
        if grid.glue is not None:
            _check_glue(options.grid, grid.glue)
        folder = StudyFolder(options.out or default_folder(grid))
        folder.check_contents(grid)
        ranks = options.ranks or grid.ranks
        on_gpu = grid.scale in ("gpu", "paper") or gpu_count() > 0
        device = find_device(options.gpu or ("a100-80" if on_gpu else "cpu"), ranks)
        settings = {}
        with tempfile.TemporaryDirectory() as drafts:
            for run in grid.runs:
                recipe = folder.write_recipe(run, Path(drafts) / f"{run.name}.yaml")
                settings[run.name] = resolve_plan(str(recipe), run.of_its_own(options.overrides), None, ranks)
        for run in grid.runs:
            check_same(folder.path / run.name, settings[run.name])
        return cls(grid, folder, ranks, options.at_once, options.overrides, settings, device)

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """Of each run, by name. Building their models takes seconds, so other mistakes are looked for before.

        Raises ValueError for a model that cannot be built.
        """
        return estimate(self.grid.runs, self.settings, self.device)

    def check_gpus(self) -> None:
        """Raises ValueError, with the fix, if a run has more ranks than this machine has GPUs."""
        gpus, settings = gpu_count(), self.settings[self.grid.runs[0].name]
        if 0 < gpus < self.ranks:
            fewer = max(ranks for ranks in range(1, gpus + 1) if self.ranks % ranks == 0)
            accumulation = settings.config.train.gradient_accumulation_steps * self.ranks // fewer
            raise ValueError(
                f"{self.ranks} ranks a run need {self.ranks} GPUs, and this machine has {gpus}; --ranks {fewer} "
                f"train.gradient_accumulation_steps={accumulation} has as many tokens a step"
            )

    def check_data(self) -> None:
        """Check the data folders of the unfinished runs: they exist and have held-out rows.

        Raises ValueError or OSError, in one line with the fix.
        """
        for run in self.grid.runs:
            if not self.folder.is_finished(run.name):
                config = self.settings[run.name].config
                for name, path in (config.train.eval_sets or {}).items():
                    with prefix_errors(f"train.eval_sets.{name}"):
                        read_data_manifest(Path(path).expanduser())  # its contents were checked with the settings
                if read_data_manifest(Path(config.data.dir).expanduser()).validation_rows == 0:
                    raise ValueError(
                        f"{run.name}: {config.data.dir} has no held-out rows, and a study compares held-out losses; "
                        "prepare it with --validation above 0"
                    )

    def plan_table(self) -> str:
        """Runs, steps, tokens and hours, for people."""
        finished = [run.name for run in self.grid.runs if self.folder.is_finished(run.name)]
        return "\n".join([*cost_table(self.costs, finished), *self._fine_tunings(), *self._assumptions()])

    def _fine_tunings(self) -> list[str]:
        if self.grid.glue is None:
            return []
        options, exports = check_glue("glue", self.grid.glue), 0
        tasks, seeds = len(options.tasks), options.seeds
        for name, settings in self.settings.items():
            every = settings.config.train.export_every
            exports += exports_without_results(self.folder.run(name), settings.total_steps, every)
        product = f"{exports} exports x {tasks} tasks x {seeds} seeds"
        return [f"plus {exports * tasks * seeds:,} fine-tunings ({product}), not included in the hours"]

    def _assumptions(self) -> list[str]:
        corpora = dict.fromkeys(settings.corpus for settings in self.settings.values())
        return [f"data: {corpus.source}" for corpus in corpora if corpus.fingerprint is None]

    def run(self, report: Callable[[str], None] = _print) -> dict[str, str]:
        """Run what is not finished, in the grid's order (teachers first).

        Returns:
            How each run ended, by name.

        Raises:
            KeyboardInterrupt: after the runs in progress have saved and ended.
        """
        places = {run.name: f"[{place}/{len(self.grid.runs)}]" for place, run in enumerate(self.grid.runs, start=1)}
        status = {name: FINISHED if self.folder.is_finished(name) else WAITING for name in places}
        self.folder.write_grid(self.grid, status)
        waiting = {run.name: run for run in self.grid.runs}
        running: dict[Future[str], StudyRun] = {}
        progress = StudyProgress(self.folder, {name: each.total_steps for name, each in self.settings.items()})
        with stop_on_signals() as stop, ThreadPoolExecutor(self.at_once) as pool:
            try:
                while running or (waiting and not stop.is_set()):
                    for run in [] if stop.is_set() else self._ready(waiting, list(running.values())):
                        del waiting[run.name]
                        started = pool.submit(self._run_one, run, places[run.name], report, stop)
                        running[started] = run
                    ended, _ = wait(running, progress.seconds_to_next(), FIRST_COMPLETED)
                    for future in ended:
                        run = running.pop(future)
                        status[run.name] = future.result()
                        self.folder.write_grid(self.grid, status)
                        report(f"{places[run.name]} {run.name}: {status[run.name]}{self._held_out(run)}")
                    if running and progress.seconds_to_next() == 0:
                        report(progress.line(len(running)))
                interrupted = stop.is_set()
            finally:
                stop.set()
        if interrupted and WAITING in status.values():
            raise KeyboardInterrupt
        return status

    def _ready(self, waiting: Mapping[str, StudyRun], running: Sequence[StudyRun]) -> list[StudyRun]:
        """The waiting runs to start now: their teachers have ended, and there is room for them."""
        to_come = {*waiting, *(run.name for run in running)}
        ready = [run for run in waiting.values() if run.teacher_run not in to_come]
        return ready[: self.at_once - len(running)]

    def _run_one(self, run: StudyRun, place: str, report: Callable[[str], None], stop: threading.Event) -> str:
        """Runs in a thread; returns how the run ended."""
        if run.teacher_run is not None and not self.folder.is_finished(run.teacher_run):
            return f"skipped: its teacher {run.teacher_run} is not finished"
        log = self.folder.log(run.name)
        if not self.folder.is_finished(run.name):
            recipe = self.folder.write_recipe(run, self.folder.recipe(run.name))
            command = pretrain_command(recipe, run.of_its_own(self.overrides), self.ranks)
            report(f"{place} {run.name}\n    $ {shlex.join(command)}")
            began = time.monotonic()
            code = run_logged(command, log, stop)
            if not self.folder.is_finished(run.name):
                if code in (0, STOPPED):  # somebody asked this one run to stop
                    stop.set()
                if stop.is_set():
                    return WAITING
                return f"failed with exit code {code} after {time.monotonic() - began:.0f} s; see {log}"
        if self.grid.glue is not None:
            code = score_exports(self.folder.run(run.name), self.grid.glue, log, stop)
            if stop.is_set():
                return WAITING
            if code != 0:
                return f"pre-trained, but its fine-tuning failed with exit code {code}; see {log}"
        return FINISHED

    def _held_out(self, run: StudyRun) -> str:
        rows = RunRecord(run.name, self.folder.path / run.name).held_out
        return f", held-out MLM loss {rows[-1][EVAL_LOSS]:.4f} at step {rows[-1]['step']}" if rows else ""


def default_folder(grid: Grid) -> Path:
    """runs/study/SCALE, which grids share; runs/study/SCALE_GRID for a grid that changes the settings of its runs."""
    return Path("runs") / "study" / (f"{grid.scale}_{grid.name}" if grid.has_own_settings else grid.scale)


def run_study(options: StudyOptions, *, dry_run: bool) -> int:
    """Run the study, or only show its plan.

    Returns:
        Exit code: 0 if all runs are finished, 1 if not, 130 if it was interrupted.
    """
    study = Study.open(options)
    if not dry_run:
        study.check_gpus()
        study.check_data()
    plan_table = study.plan_table()
    at_once = f", {study.at_once} at once" if study.at_once > 1 else ""
    runs, ranks = counted(len(study.grid.runs), "run"), counted(study.ranks, "rank")
    _print(f"{study.grid.title}: {runs} in {study.folder.path}, {ranks} each{at_once}")
    if study.grid.question:
        _print(study.grid.question)
    _print("")
    _print(plan_table)
    if dry_run:
        return 0
    _print("")
    try:
        with FolderLock(study.folder.path, f"--out {study.folder.path}"):
            status = study.run()
    except KeyboardInterrupt:
        print("interrupted: the same command resumes the study", file=sys.stderr)
        return 130
    unfinished = {name: how for name, how in status.items() if how != FINISHED}
    _print(f"\n{len(status) - len(unfinished)} of {len(status)} runs are finished")
    for name, how in unfinished.items():
        _print(f"{name}: {how}")
    _print(f"to see the results: dwt-ds report {shlex.quote(str(study.folder.path))}")
    return 1 if unfinished else 0


def _check_override(grid: Grid, override: str) -> None:
    """A report calls runs by their labels, so these must stay true."""
    key = key_of(override)

    def changes(place: str) -> bool:
        return is_within(key, place) or is_within(place, key)

    for place in filter(changes, _NOT_OVERRIDDEN):
        raise ValueError(f"override {override!r}: the study sets {place} itself; use options such as --out, --seeds")
    runs = [run for run in grid.runs if run.of_its_own([override])]
    if labels := dict.fromkeys(label for run in runs for place, label in run.set_by.items() if changes(place)):
        raise ValueError(
            f"override {override!r}: the grid's labels {', '.join(labels)} set this; leave it out, or write a grid of "
            "your own"
        )


def _check_glue(grid: str, glue: dict[str, object]) -> None:
    check_glue(f"grid {grid}: glue", glue)
    check_packages()
    folder = str(glue.get("dir", HUB))
    if folder != HUB and not Path(folder).expanduser().is_dir():
        raise FileNotFoundError(f"GLUE folder {folder!r}: no such folder; give one with GLUE's TSV files, or {HUB}")
