"""The table at the top of a report on runs, one column per run: sizes, cost, held-out losses, savings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from dwt_ds.distill.metrics_keys import EVAL_LOSS
from dwt_ds.run.progress import clock
from dwt_ds.study.costs import Spent, saved_share, whole_training
from dwt_ds.study.models import size_in_words, student_config, teacher_config
from dwt_ds.study.records import RunRecord
from dwt_ds.study.savings import saving
from dwt_ds.study.step_time import STEP_TIME_NOTE, at_equal_steps, step_after_release
from dwt_ds.study.tables import NOT_KNOWN, TIME_NOTE, mean_cell

_MANY_TOKENS = 1e8
OVERVIEW_NOTE = (
    "Losses in nats per masked token, lower is better. Tokens/s and MFU (model FLOPs utilization) are means over the "
    "whole run, all ranks together, without evaluations and checkpoints; time includes them."
)


def overview(runs: Sequence[RunRecord], against: RunRecord | None) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table, the runs in the order given; `against`, if any, has an evaluation."""
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
        f"As good as {name}: when a run's held-out loss first reaches the final loss of {name}, "
        f"{against.final_loss:.4f} (interpolated between evaluations); in brackets, the share of {name}'s own tokens, "
        "FLOPs and time that this saves. FLOPs include the teacher's forward passes until its release. The rows that "
        "say so also count the teacher's own training, which is known if teacher.path is in the export of a run. The "
        f'rows "a step after the release" and "all steps" follow from the step times. {STEP_TIME_NOTE} {TIME_NOTE}'
    )


def _comparison(runs: Sequence[RunRecord], against: RunRecord) -> list[list[str]]:
    compared = [run for run in runs if run is not against and run.is_evaluated]
    savings = {run.name: saving(run, against) for run in compared}
    own = whole_training(against)

    def row(what: str, cell: Callable[[RunRecord], str], ours: str = "") -> list[str]:
        return [what, *(ours if run is against else cell(run) if run in compared else "" for run in runs)]

    def without_teacher(unit: str, run: RunRecord) -> str:
        found = savings[run.name]
        return "never" if found is None else _saved(found.spent, own, unit)

    def with_teacher(unit: str, run: RunRecord) -> str:
        found = savings[run.name]
        if found is None or not run.has_teacher:
            return "never" if run.has_teacher else ""
        spent = found.spent_with_teacher
        return NOT_KNOWN if spent is None else _saved(spent, own, unit)

    def ratio_to_against(ratio: Callable[[RunRecord, RunRecord], float | None], run: RunRecord) -> str:
        return mean_cell([ratio(run, against)], "{:.2f}")

    name = against.name
    rows = [row(f"held-out loss minus {name}'s", lambda run: f"{run.final_loss - against.final_loss:+.4f}")]
    for unit, (what, _) in _UNITS.items():
        rows.append(row(f"as good as {name} after: {what}", partial(without_teacher, unit), _amount(own, unit)))
    for unit, (what, _) in _UNITS.items():
        rows.append(row(f"as good as {name}, the teacher's training counted: {what}", partial(with_teacher, unit)))
    for what, ratio in (("a step after the release", step_after_release), ("all steps", at_equal_steps)):
        rows.append(row(f"{what}, {name} = 1", partial(ratio_to_against, ratio)))
    return rows


def _saved(ours: Spent, theirs: Spent, unit: str) -> str:
    """`1,500 (25% saved)`."""
    amount, share = _amount(ours, unit), saved_share(ours, theirs, unit)
    return amount if share is None else f"{amount} ({abs(share):.0%} {'saved' if share >= 0 else 'more'})"


def _amount(spent: Spent, unit: str) -> str:
    value = getattr(spent, unit)
    return NOT_KNOWN if value is None else _UNITS[unit][1](value)


def _evaluated(runs: Sequence[RunRecord]) -> list[str]:
    """Keys of all held-out losses, also on `train.eval_sets` (`eval_hard_loss.NAME`)."""
    keys = dict.fromkeys(key for run in runs for row in run.evaluation_rows for key in row if key.startswith("eval_"))
    teacher = any(run.has_teacher for run in runs)
    return [key for key in keys if teacher or "soft" not in key]


_LOSS_NAMES = {
    EVAL_LOSS: "held-out loss",
    "eval_soft_loss": "held-out KL from the teacher",
    "eval_shared_hard_loss": "held-out loss on the shared entries",
}


def _loss_name(key: str) -> str:
    kind, _, name = key.partition(".")
    words = _LOSS_NAMES.get(kind, kind)
    return f"{words}, {name}" if name else words


def _last(run: RunRecord, key: str) -> str:
    if "soft" in key and not run.has_teacher:
        return ""
    rows = [row for row in run.evaluation_rows if key in row]
    if not rows:
        return ""
    loss, step = rows[-1][key], rows[-1]["step"]
    # That of an earlier evaluation: after the teacher's release there is no KL from it.
    when = "" if step == run.evaluation_rows[-1]["step"] else f" (step {step:,})"
    return ("not finite" if loss is None else f"{loss:.4f}") + when


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
    if not run.has_teacher:
        return "" if without is None else f"{without:.3g}"
    parts = (with_teacher, " with the teacher"), (without, " without")
    return ", ".join(f"{seconds:.3g}{words}" for seconds, words in parts if seconds is not None)


def _at_the_end(x: str, form: Callable[[float], str]) -> Callable[[RunRecord], str]:
    return lambda run: form(run.training[-1][x]) if run.training else ""


def _count(tokens: float) -> str:
    """`2,000`, or `13,107.2 M` from _MANY_TOKENS on."""
    return f"{tokens / 1e6:,.1f} M" if tokens >= _MANY_TOKENS else f"{tokens:,.0f}"


def _rate(run: RunRecord) -> str:
    rate = run.tokens_per_second
    return "" if rate is None else f"{rate:,.0f}"


def _mfu(run: RunRecord) -> str:
    whole, student = run.mean_over_time("mfu"), run.mean_over_time("mfu_student")
    if whole is None:
        return ""
    return f"{whole:.1%}" + (f" (student's {student:.1%})" if run.has_teacher and student is not None else "")


_CELLS: dict[str, Callable[[RunRecord], str]] = {
    "state": lambda run: "complete" if run.finished else "not complete",
    "student": _student,
    "teacher": _teacher,
    "steps": _at_the_end("step", "{:,}".format),
    "steps with the teacher": _taught,
    "tokens": _at_the_end("tokens", _count),
    "time": _at_the_end("elapsed_seconds", clock),
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
