"""The table on top of a report about runs: sizes, cost, held-out losses, what was saved; a column a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dwt_ds.run.progress import clock
from dwt_ds.study.models import size_in_words, student_config, teacher_config
from dwt_ds.study.records import RunRecord
from dwt_ds.study.results import Saving, saving, whole_training

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
    return (
        f"As good as {against.name}: where a run's held-out loss first reaches {against.final_loss:.4f}, with which "
        f"{against.name} ends, interpolated between two evaluations; in brackets the share of {against.name}'s own "
        "tokens, FLOPs and time that this saves. FLOPs include the teacher's forward passes until it is released, but "
        "not its own training."
    )


def _comparison(runs: Sequence[RunRecord], against: RunRecord) -> list[list[str]]:
    compared = [run for run in runs if run is not against and run.is_evaluated]
    savings = {run.name: saving(run, against) for run in compared}

    def row(what: str, own: str, cell: Callable[[Saving], str]) -> list[str]:
        cells = [own if run is against else cell(savings[run.name]) if run in compared else "" for run in runs]
        return [f"as good as {against.name} after: {what}", *cells]

    last, (_, flops) = against.held_out[-1], whole_training(against)
    own_flops = "not known" if flops is None else f"{flops:.2e}"
    differences = [f"{run.final_loss - against.final_loss:+.4f}" if run in compared else "" for run in runs]
    return [
        [f"held-out loss minus {against.name}'s", *differences],
        row("tokens", _count(last["tokens"]), lambda s: _saved(s, s.tokens, s.tokens_saved, _count)),
        row("FLOPs", own_flops, lambda s: _saved(s, s.flops, s.flops_saved, "{:.2e}".format)),
        row("time", clock(last["elapsed_seconds"]), lambda s: _saved(s, s.seconds, s.seconds_saved, clock)),
    ]


def _saved(saving: Saving, value: float | None, share: float | None, words: Callable[[float], str]) -> str:
    """`1,500 (25% saved)`."""
    if saving.tokens is None:
        return "never"
    if value is None:
        return "not known"
    if share is None:
        return words(value)
    return f"{words(value)} ({abs(share):.0%} {'saved' if share >= 0 else 'more'})"


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
    "tokens": _tokens,
    "time": _time,
    "tokens/s": _rate,
    "MFU": _mfu,
}
