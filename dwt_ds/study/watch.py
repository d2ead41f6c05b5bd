"""The state of a run in progress, from the files in its folder alone, so any machine that sees them can watch."""

from __future__ import annotations

import shutil
import textwrap
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dwt_ds.base.files import read_json
from dwt_ds.base.locks import current_writer
from dwt_ds.base.run_files import DS_JSON, RECIPE, STUCK
from dwt_ds.base.words import GIB
from dwt_ds.base.yaml_and_json import read_yaml
from dwt_ds.config.objective import Schedule
from dwt_ds.distill.metrics_keys import EVAL_LOSS, eval_losses
from dwt_ds.distill.release import work_left, zero_from
from dwt_ds.engine.checkpoint.manifest import complete_checkpoints
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.progress import clock, evaluation_words, step_words
from dwt_ds.run.stop import STOP_FILE
from dwt_ds.run.stuck import read_reports, who_waits_for_whom
from dwt_ds.study.records import START_LEFT_OUT
from dwt_ds.study.terminal_chart import block_curve

# With less free space the disk counts as nearly full, however small a checkpoint is.
_NEARLY_FULL_BYTES = GIB
# A pause between two lines is long if it is over a minute and over this many times the longest so far.
_LONG, _LONG_SECONDS = 3, 60.0
_ROWS_FOR_ETA = 10
_CURVE_HEIGHT, _LEAST_CURVE_HEIGHT = 6, 3


@dataclass(frozen=True)
class Observation:
    """A run at one moment."""

    state: str
    """One line: the run, its progress, the process that runs it."""
    last: list[str]
    """The last logged step and the last evaluation, a line each."""
    training: list[tuple[int, float]]
    """(step, hard loss)."""
    held_out: list[tuple[int, float]]
    """(step, held-out loss)."""
    problems: list[str]
    """What is wrong, a line each."""
    complete: bool


class _Run:
    """What the folder of a run has at one moment."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, RunFolder(path)
        if not (self.folder.path / RECIPE).is_file():
            raise ValueError(f"{path}: holds no run (config.yaml); give the output_dir of one that has started")
        self.config: dict[str, Any] = read_yaml(self.folder.path / RECIPE, "settings")
        self.ds_values = read_json(self.folder.path / DS_JSON)
        rows = self.folder.metrics_rows()
        self.steps = [row for row in rows if "loss" in row]
        self.evaluations = [row for row in rows if eval_losses(row)]
        self.held_out = [(row["step"], row[EVAL_LOSS]) for row in self.evaluations if row.get(EVAL_LOSS) is not None]
        finished = self.folder.finished_steps()
        scheduled = self.ds_values.get("scheduler", {}).get("params", {}).get("total_num_steps")
        self.total: int | None = finished or self.config["train"]["max_steps"] or scheduled
        """Steps of the whole run; None if they follow from the data."""
        self.complete, self.writer = finished > 0, current_writer(self.folder.path)
        self.skips = self.folder.skipped_rows()


def observe(path: Path) -> Observation:
    """Read the folder of a run; nothing is written there.

    Raises:
        ValueError, OSError: it is not the folder of a run, or cannot be read.
    """
    run = _Run(path)
    return Observation(
        state=_state(run),
        last=[*_last_step(run), *_last_evaluation(run)],
        training=[(row["step"], row["hard_loss"]) for row in run.steps if row["hard_loss"] is not None],
        held_out=run.held_out,
        problems=[] if run.complete else _problems(run),
        complete=run.complete,
    )


def lines_of(seen: Observation, width: int, height: int | None = None) -> list[str]:
    """The observation for people, the most important lines first.

    Args:
        width: columns of the curves and, in a terminal, of all lines.
        height: lines of the terminal, in which the curves should fit; None: not a terminal.
    """
    lines = [seen.state, *seen.last, *(f"! {problem}" for problem in seen.problems)]
    if height is not None:
        lines = [part for line in lines for part in _broken(line, width)]
    curves = []
    for name, points in (("training loss (hard)", seen.training), ("held-out loss", seen.held_out)):
        shown = [point for point in points if point[0] >= START_LEFT_OUT * points[-1][0]]
        if len(shown) > 1:
            curves.append((name, shown))
    room = _CURVE_HEIGHT
    if height is not None and curves:
        # Besides its curve, each chart takes an empty line, its name and two lines of axis; the cursor takes one line.
        room = min(room, max(_LEAST_CURVE_HEIGHT, (height - 1 - len(lines)) // len(curves) - 4))
    for name, shown in curves:
        lines += ["", name, *block_curve(*zip(*shown), width=width, height=room)]
    return lines


def _broken(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width`, broken at double spaces if possible, else at single ones."""
    lines: list[str] = []
    wrapper = textwrap.TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    for part in text.split("  "):
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            wrapper.initial_indent = "  " if lines else ""
            lines += wrapper.wrap(part)
    return lines


def _state(run: _Run) -> str:
    done, total = run.steps[-1]["step"] if run.steps else 0, run.total
    far = f"step {done:,}" + (f" of {total:,} ({done / total:.0%})" if total else "")
    skipped = f", {len(run.skips):,} skipped" if run.skips else ""
    doing = "complete" if run.complete else f"running: {run.writer}" if run.writer else "not running"
    left = "" if run.complete or not run.writer or not total else _time_left(run, total)
    return f"{run.path}  {far}{skipped}  {doing}{left}"


def _time_left(run: _Run, total: int) -> str:
    last, recent = run.steps[-1] if run.steps else {}, run.steps[-_ROWS_FOR_ETA:]
    # After a release only the last row with the teacher and the rows after it tell the pace.
    taught = [number for number, row in enumerate(recent) if row.get("teacher_active")]
    if taught and not last["teacher_active"]:
        recent = recent[taught[-1] :]
    if len(recent) < 2:
        return ""
    seconds = last["elapsed_seconds"] - recent[0]["elapsed_seconds"]
    seconds_a_step = seconds / (last["step"] - recent[0]["step"])
    release, share = None, 1.0
    if last.get("teacher_active") and "mfu" in last and run.config["teacher"].get("release") == "auto":
        release = zero_from(Schedule(**run.config["distill"]["soft_weight"]), total)
        share = last["mfu_student"] / last["mfu"]
    return f"  ETA {clock(seconds_a_step * work_left(last['step'], total, release, share))}"


def _last_step(run: _Run) -> list[str]:
    if not run.steps:
        return ["no step is logged yet"]
    # What was not finite is null in the file.
    row = {name: float("nan") if value is None else value for name, value in run.steps[-1].items()}
    distill = run.config["distill"]
    hidden_weight = distill.get("hidden_weight", 0.0)  # runs of earlier versions have none
    return [step_words(row, run.total or run.steps[-1]["step"], distill["hard_weight"], hidden_weight)]


def _last_evaluation(run: _Run) -> list[str]:
    if not run.evaluations:
        return []
    last = run.evaluations[-1]["step"]
    step, loss = min(run.held_out, key=lambda point: point[1], default=(last, 0.0))
    lowest = "" if step == last else f"  lowest hard {loss:.4f} at step {step:,}"
    return [f"step {last:,}  {evaluation_words(run.evaluations[-1])}{lowest}"]


def _problems(run: _Run) -> list[str]:
    problems, steps = [], run.steps
    if run.writer is None:
        problems.append("the run is not complete and no process is running it; run the same command to resume")
    elif (run.folder.path / STOP_FILE).exists():
        problems.append("it was asked to stop: it saves a checkpoint and ends")
    else:
        problems += _stuck(run) or _silence(run)
    if steps and steps[-1]["loss"] is None:
        problems.append(f"the loss of step {steps[-1]['step']:,} is not finite")
    window = run.config["train"].get("skip_window", 0)  # the first versions, which skipped no steps, have none
    recent = [row for row in run.skips if not steps or row["step"] > steps[-1]["step"] - window]
    if recent:
        problems.append(
            f"{len(recent):,} of the last {window:,} steps were skipped, the latest at step {recent[-1]['step']:,}: "
            "loss or gradient was not finite, or the loss spiked; skipped.jsonl has their rows"
        )
    return problems + _full_disk(run.folder)


def _stuck(run: _Run) -> list[str]:
    """What the ranks report about being stuck, if that is newer than the last line of the metrics."""
    rows_of_a_rank = run.ds_values["train_micro_batch_size_per_gpu"] * run.ds_values["gradient_accumulation_steps"]
    ranks = run.ds_values["train_batch_size"] // rows_of_a_rank
    found = read_reports(run.folder.path / STUCK, ranks, _last_written(run.folder))
    return [f"stuck: {line}" for line in who_waits_for_whom(found, ranks)] if found else []


def _silence(run: _Run) -> list[str]:
    seconds = time.time() - _last_written(run.folder)
    times = [row["elapsed_seconds"] for row in run.steps]
    if len(times) < 2:
        allowed, pace = run.config["train"]["report_stuck_after_seconds"], ""
    else:
        longest = max(after - before for before, after in pairwise(times))
        allowed = max(_LONG_SECONDS, _LONG * longest)
        pace = f"; the longest pause so far was {clock(longest)}: a long evaluation or checkpoint, or it hangs"
    return [f"no new line for {clock(seconds)}{pace}"] if seconds > allowed else []


def _last_written(folder: RunFolder) -> float:
    """When the last line was added to the metrics or, before the first, when the run began; seconds since the epoch."""
    began = (folder.path / RECIPE).stat().st_mtime
    return max(began, folder.metrics.stat().st_mtime) if folder.metrics.is_file() else began


def _full_disk(folder: RunFolder) -> list[str]:
    free = shutil.disk_usage(folder.path).free
    newest = max(complete_checkpoints(folder.checkpoints), default=None)
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) if newest else 0
    if free >= max(_NEARLY_FULL_BYTES, 2 * size):
        return []
    takes = f"; a checkpoint takes {size / GIB:.1f} GiB" if size else ""
    return [f"the disk is nearly full: {free / GIB:.1f} GiB free{takes}"]
