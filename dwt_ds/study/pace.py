"""How fast runs train, with their teacher and after its release, by the steps that they logged."""

from __future__ import annotations

from collections.abc import Sequence

from dwt_ds.study.records import RunRecord
from dwt_ds.study.savings import saving
from dwt_ds.study.tables import TIME_NOTE, Compared, Table, mean_cell, percent

PACE_NOTE = (
    "A pace is the median over the logged intervals of training, without evaluations and checkpoints, so that what the "
    "machine does besides at times does not count."
)


def paced_seconds(run: RunRecord, steps: float) -> float | None:
    """Seconds of the first `steps` optimizer steps at the run's pace with the teacher and without it.

    None if no interval of such steps was logged.
    """
    taught, seconds = min(steps, float(run.steps_with_teacher)), 0.0
    for count, with_teacher in ((taught, True), (steps - taught, False)):
        if count > 0:
            a_step = run.seconds_a_step(with_teacher=with_teacher)
            if a_step is None:
                return None
            seconds += count * a_step
    return seconds


def step_after_release(run: RunRecord, other: RunRecord) -> float | None:
    """A step without the teacher, in units of the other run's step without one; None if either is not known."""
    ours, theirs = (each.seconds_a_step(with_teacher=False) for each in (run, other))
    return ours / theirs if ours and theirs and run.has_teacher else None


def at_equal_steps(run: RunRecord, other: RunRecord) -> float | None:
    """Seconds of a run at its pace in units of the other's, both up to the shorter one's end; None if not known."""
    steps = min(each.training[-1]["step"] for each in (run, other))
    ours, theirs = (paced_seconds(each, steps) for each in (run, other))
    return ours / theirs if ours and theirs else None


def paced_saving(run: RunRecord, other: RunRecord) -> float | None:
    """Share of the other's seconds that a run saves until it is as good, both at their paces.

    None if it never is, or if that is not known.
    """
    found = saving(run, other)
    if found is None:
        return None
    ours = paced_seconds(run, run.along("tokens", found.spent.tokens, "step"))
    theirs = paced_seconds(other, other.held_out[-1]["step"])
    return 1 - ours / theirs if ours and theirs else None


def pace_table(compared: Compared) -> Table:
    """Seconds a step of each series, and what they make of its whole run."""

    def own(group: list[RunRecord]) -> tuple[str, ...]:
        return (*_pace(group), "", "", "", str(len(group)))

    def cells(pairs: list[tuple[RunRecord, RunRecord]]) -> tuple[str, ...]:
        after, whole = ([ratio(*pair) for pair in pairs] for ratio in (step_after_release, at_equal_steps))
        saved = [paced_saving(*pair) for pair in pairs]
        return (
            *_pace([run for run, _ in pairs]),
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
        f"{PACE_NOTE} The last three columns follow from the paces: a step once the teacher is released, the whole run "
        f"at equal steps, and the share of {compared.reference}'s seconds that is saved until a run is as good. "
        f"{TIME_NOTE}"
    )
    return Table("Pace", head, compared.rows(own, cells), note)


def _pace(runs: Sequence[RunRecord]) -> tuple[str, str, str]:
    with_teacher, without = (
        mean_cell([run.seconds_a_step(with_teacher=each) for run in runs], "{:.3g}") for each in (True, False)
    )
    shares = [run.steps_with_teacher / run.training[-1]["step"] for run in runs if run.has_teacher]
    return with_teacher, without, percent(shares) if shares else ""
