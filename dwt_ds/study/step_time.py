"""Seconds per step of runs with their teacher and after its release, from their logged steps."""

from __future__ import annotations

from collections.abc import Sequence

from dwt_ds.study.records import RunRecord
from dwt_ds.study.savings import saving
from dwt_ds.study.tables import TIME_NOTE, Compared, Table, mean_cell, percent

STEP_TIME_NOTE = (
    "A step time is the median over the logged intervals of training, without evaluations and checkpoints, so other "
    "work that the machine did for a while does not count."
)


def seconds_of_steps(run: RunRecord, steps: float) -> float | None:
    """Seconds of the first `steps` optimizer steps by the run's step times; None if one is not known."""
    taught, seconds = run.with_teacher("step", steps), 0.0
    for count, with_teacher in ((taught, True), (steps - taught, False)):
        if count > 0:
            a_step = run.seconds_a_step(with_teacher=with_teacher)
            if a_step is None:
                return None
            seconds += count * a_step
    return seconds


def step_after_release(run: RunRecord, other: RunRecord) -> float | None:
    """Time of a step after the release relative to the other run's step; None if either is not known."""
    ours, theirs = (each.seconds_a_step(with_teacher=False) for each in (run, other))
    return ours / theirs if ours and theirs and run.has_teacher else None


def at_equal_steps(run: RunRecord, other: RunRecord) -> float | None:
    """Time of a run relative to the other's, both by step times over the shorter one's steps; None if not known."""
    steps = min(each.training[-1]["step"] for each in (run, other))
    ours, theirs = (seconds_of_steps(each, steps) for each in (run, other))
    return ours / theirs if ours and theirs else None


def step_time_saving(run: RunRecord, other: RunRecord) -> float | None:
    """Share of the other's seconds saved until the run is as good, both by step times; None if never or not known."""
    found = saving(run, other)
    if found is None:
        return None
    ours = seconds_of_steps(run, run.along("tokens", found.spent.tokens, "step"))
    theirs = seconds_of_steps(other, other.held_out[-1]["step"])
    return 1 - ours / theirs if ours and theirs else None


def step_time_table(compared: Compared) -> Table:
    """Seconds per step of each series, and what follows from them for whole runs."""

    def own(group: list[RunRecord]) -> tuple[str, ...]:
        return (*_step_times(group), "", "", "", str(len(group)))

    def cells(pairs: list[tuple[RunRecord, RunRecord]]) -> tuple[str, ...]:
        after, whole = ([ratio(*pair) for pair in pairs] for ratio in (step_after_release, at_equal_steps))
        saved = [step_time_saving(*pair) for pair in pairs]
        return (
            *_step_times([run for run, _ in pairs]),
            mean_cell(after, "{:.2f}"),
            mean_cell(whole, "{:.2f}"),
            "" if None in saved else percent(saved),
            str(len(pairs)),
        )

    unit = f"{compared.reference} = 1"
    head = (
        "series",
        "seconds a step with the teacher",
        "without",
        "steps with the teacher",
        f"a step after the release, {unit}",
        f"all steps, {unit}",
        "seconds saved until as good",
        "pairs",
    )
    note = (
        f"{STEP_TIME_NOTE} The last three columns follow from the step times: a step after the teacher's release, the "
        f"whole run at equal steps, and the share of {compared.reference}'s seconds saved until a run is as good. "
        f"{TIME_NOTE}"
    )
    return Table("Step time", head, compared.rows(own, cells), note)


def _step_times(runs: Sequence[RunRecord]) -> tuple[str, str, str]:
    with_teacher, without = (
        mean_cell([run.seconds_a_step(with_teacher=each) for run in runs], "{:.3g}") for each in (True, False)
    )
    shares = [run.steps_with_teacher / run.training[-1]["step"] for run in runs if run.has_teacher]
    return with_teacher, without, percent(shares) if shares else ""
