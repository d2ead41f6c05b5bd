"""The table on top of a report about runs: sizes, cost, held-out losses, what was saved; a column a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from dwt_ds.run.progress import clock
from dwt_ds.study.costs import Saved, Spent, whole_training
from dwt_ds.study.models import size_in_words, student_config, teacher_config
from dwt_ds.study.pace import PACE_NOTE, at_equal_steps, step_after_release
from dwt_ds.study.records import RunRecord
from dwt_ds.study.savings import saving
from dwt_ds.study.tables import TIME_NOTE

_HELD_OUT = "eval_hard_loss"
_MANY_TOKENS = 1e8
OVERVIEW_NOTE = (
    "Losses in nats per masked token, lower is better. Tokens/s and MFU (model FLOPs utilization) are means over the "
    "whole run, all ranks together, without evaluations and checkpoints; time includes them."
)


def overview(runs: Sequence[RunRecord], against: RunRecord | None) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table.

    Args:
        runs: in the order of the columns.
        against: the run that the others are compared with; it has an evaluation.
    """
    rows = [[name, *map(cell, runs)] for name, cell in _CELLS.items()]
    for key in _evaluated(runs):
        rows.append([_loss_name(key), *(_last(run, key) for run in runs)])
    if against is not None:
        rows += _comparison(runs, against)
    return ["", *(run.name for run in runs)], [row for row in rows if any(row[1:])]


def against_note(against: RunRecord) -> str:
    """What the rows of the comparison mean."""
    name = against.name
    return (
        f"As good as {name}: where a run's held-out loss first reaches {against.final_loss:.4f}, with which {name} "
        f"ends, interpolated between two evaluations; in brackets the share of {name}'s own tokens, FLOPs and time "
        "that this saves. FLOPs include the teacher's forward passes until it is released. Its own training is counted "
        "where a row says so; it is known where teacher.path lies in the export of a run. A step after the release, "
        f"and all steps, are at the runs' paces. {PACE_NOTE} {TIME_NOTE}"
    )


def _comparison(runs: Sequence[RunRecord], against: RunRecord) -> list[list[str]]:
    compared = [run for run in runs if run is not against and run.is_evaluated]
    savings = {run.name: saving(run, against) for run in compared}
    own = whole_training(against)

    def row(what: str, cell: Callable[[RunRecord], str], ours: str = "") -> list[str]:
        return [what, *(ours if run is against else cell(run) if run in compared else "" for run in runs)]

    def after(unit: str, words: Callable[[float], str], *, with_teacher: bool) -> Callable[[RunRecord], str]:
        def cell(run: RunRecord) -> str:
            found = savings[run.name]
            if with_teacher and not run.has_teacher:
                return ""
            if found is None:
                return "never"
            if with_teacher:
                return "not known" if found.teacher is None else _saved(found.spent + found.teacher, own, unit, words)
            return _saved(found.spent, own, unit, words)

        return cell

    name, rows = against.name, []
    rows.append(row(f"held-out loss minus {name}'s", lambda run: f"{run.final_loss - against.final_loss:+.4f}"))
    for unit, (what, words) in _UNITS.items():
        ours = _words(getattr(own, unit), words)
        rows.append(row(f"as good as {name} after: {what}", after(unit, words, with_teacher=False), ours))
    for unit, (what, words) in _UNITS.items():
        cell = after(unit, words, with_teacher=True)
        rows.append(row(f"as good as {name}, the teacher's training counted: {what}", cell))
    for what, ratio in (("a step after the release", step_after_release), ("all steps", at_equal_steps)):
        rows.append(row(f"{what}, {name} = 1", partial(_ratio, ratio, against)))
    return rows


def _ratio(ratio: Callable[[RunRecord, RunRecord], float | None], against: RunRecord, run: RunRecord) -> str:
    value = ratio(run, against)
    return "" if value is None else f"{value:.2f}"


def _saved(ours: Spent, theirs: Spent, unit: str, words: Callable[[float], str]) -> str:
    """`1,500 (25% saved)`."""
    value, share = _words(getattr(ours, unit), words), getattr(Saved.of(ours, theirs), unit)
    return value if share is None else f"{value} ({abs(share):.0%} {'saved' if share >= 0 else 'more'})"


def _words(value: float | None, words: Callable[[float], str]) -> str:
    return "not known" if value is None else words(value)


def _evaluated(runs: Sequence[RunRecord]) -> list[str]:
    """Keys of held-out losses in any run, those of `train.eval_sets` (`eval_hard_loss.NAME`) as well."""
    keys = dict.fromkeys(key for run in runs for row in run.evaluation_rows for key in row if key.startswith("eval_"))
    teacher = any(run.has_teacher for run in runs)
    return [key for key in keys if teacher or "soft" not in key]


def _loss_name(key: str) -> str:
    kind, _, name = key.partition(".")
    words = {_HELD_OUT: "held-out loss", "eval_soft_loss": "held-out KL from the teacher"}.get(kind, kind)
    return f"{words}, {name}" if name else words


def _last(run: RunRecord, key: str) -> str:
    if "soft" in key and not run.has_teacher:
        return ""
    values = [row[key] for row in run.evaluation_rows if row.get(key) is not None]
    return f"{values[-1]:.4f}" if values else ""


def _state(run: RunRecord) -> str:
    return "complete" if run.finished else "not complete"


def _student(run: RunRecord) -> str:
    config = student_config(run)
    if config is not None:
        return size_in_words(config)
    student = run.config.get("student", {})
    return f"{student['layers']} x {student['hidden_size']}" if {"layers", "hidden_size"} <= set(student) else ""


def _teacher(run: RunRecord) -> str:
    return size_in_words(teacher_config(run)) if run.has_teacher else "none"


def _taught(run: RunRecord) -> str:
    if not run.has_teacher or not run.training:
        return ""
    return f"{run.steps_with_teacher:,} ({run.steps_with_teacher / run.training[-1]['step']:.0%})"


def _seconds_a_step(run: RunRecord) -> str:
    with_teacher, without = (run.seconds_a_step(with_teacher=each) for each in (True, False))
    parts = [("{:.3g} with the teacher", with_teacher), ("{:.3g} without", without)]
    if not run.has_teacher:
        return "" if without is None else f"{without:.3g}"
    return ", ".join(words.format(value) for words, value in parts if value is not None)


def _steps(run: RunRecord) -> str:
    return f"{run.training[-1]['step']:,}" if run.training else ""


def _tokens(run: RunRecord) -> str:
    return _count(run.training[-1]["tokens"]) if run.training else ""


def _count(tokens: float) -> str:
    """`2,000`, or `13,107.2 M` where all digits would be in the way."""
    return f"{tokens / 1e6:,.1f} M" if tokens >= _MANY_TOKENS else f"{tokens:,.0f}"


def _time(run: RunRecord) -> str:
    return clock(run.training[-1]["elapsed_seconds"]) if run.training else ""


def _rate(run: RunRecord) -> str:
    rate = run.tokens_per_second
    return "" if rate is None else f"{rate:,.0f}"


def _mfu(run: RunRecord) -> str:
    whole, student = run.mean_over_time("mfu"), run.mean_over_time("mfu_student")
    if whole is None:
        return ""
    return f"{whole:.1%}" + (f" (student's {student:.1%})" if run.has_teacher and student is not None else "")


_CELLS: dict[str, Callable[[RunRecord], str]] = {
    "state": _state,
    "student": _student,
    "teacher": _teacher,
    "steps": _steps,
    "steps with the teacher": _taught,
    "tokens": _tokens,
    "time": _time,
    "seconds a step": _seconds_a_step,
    "tokens/s": _rate,
    "MFU": _mfu,
}
# Figures of `Spent`: name, and how one is written.
_UNITS: dict[str, tuple[str, Callable[[float], str]]] = {
    "tokens": ("tokens", _count),
    "flops": ("FLOPs", "{:.2e}".format),
    "seconds": ("time", clock),
}
