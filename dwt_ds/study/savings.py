"""What a run saves until its loss reaches the final loss of another: tokens, operations, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dwt_ds.distill.metrics_keys import EVAL_LOSS
from dwt_ds.study.costs import UNITS, Spent, saved_share, spent_until, teacher_training, whole_training
from dwt_ds.study.records import RunRecord
from dwt_ds.study.tables import NOT_KNOWN, TIME_NOTE, Compared, Table, mean_cell, percent


@dataclass(frozen=True)
class Saving:
    """Cost of a run until its loss reaches the final loss of another."""

    spent: Spent
    """Without its teacher's training."""
    other: Spent
    """The other's whole training, up to its last evaluation."""
    teacher: Spent | None
    """Cost of its teacher's training; None without one, or if it is not known."""

    @property
    def spent_with_teacher(self) -> Spent | None:
        """With the teacher's training; None if that is not known."""
        return None if self.teacher is None else self.spent + self.teacher


def saving(run: RunRecord, other: RunRecord) -> Saving | None:
    """The saving of a run over another, such as the lone student with its seed; None if it never is as good.

    Between two evaluations the loss is interpolated linearly.
    """
    tokens = first_reached(
        [row["tokens"] for row in run.held_out], [row[EVAL_LOSS] for row in run.held_out], other.final_loss
    )
    if tokens is None:
        return None
    return Saving(spent_until(run, tokens), whole_training(other), teacher_training(run))


def first_reached(xs: Sequence[float], losses: Sequence[float], level: float) -> float | None:
    """The first x at which `losses`, interpolated linearly, is at `level` or below; None if it never is."""
    for index, loss in enumerate(losses):
        if loss <= level:
            if index == 0:
                return float(xs[index])
            share = (losses[index - 1] - level) / (losses[index - 1] - loss)
            return float(xs[index - 1] + share * (xs[index] - xs[index - 1]))
    return None


def savings_table(compared: Compared) -> Table:
    """Tokens, operations and seconds until each series is as good as the reference's end."""

    def own(group: list[RunRecord]) -> tuple[str, ...]:
        tokens, flops, seconds = _spent([whole_training(run) for run in group])
        return (tokens, "", flops, "", seconds, "", "", "", "", str(len(group)))

    def cells(pairs: list[tuple[RunRecord, RunRecord]]) -> tuple[str, ...]:
        found = [each for each in (saving(*pair) for pair in pairs) if each is not None]
        if len(found) < len(pairs):
            reached = f"{len(found)} of {len(pairs)} seeds" if found else "never"
            return (reached, *[""] * 8, str(len(pairs)))
        tokens, flops, seconds = _spent([each.spent for each in found])
        shares = _saved([(each.spent, each.other) for each in found])
        whole = [""] * 3
        if pairs[0][0].has_teacher:
            whole = _saved([(each.spent_with_teacher, each.other) for each in found])
        return (tokens, shares[0], flops, shares[1], seconds, shares[2], *whole, str(len(pairs)))

    units = ("tokens", "FLOPs", "seconds")
    saved_columns = [column for unit in units for column in (unit, f"{unit} saved")]
    counted = [f"{unit} saved, the teacher's training counted" for unit in units]
    note = (
        f"Cost until the held-out loss reaches the final loss of the run of {compared.reference} with the same seed "
        "(interpolated between two evaluations), and the share of that run's whole cost that this saves (below 0: it "
        "costs more); mean ± one standard deviation over seeds. The reference's row has its whole training. FLOPs are "
        "those of matrix products, with the teacher's forward passes until its release. Seconds include evaluations "
        f"and checkpoints. The last three columns add the cost of the teacher's own training. {TIME_NOTE}"
    )
    title = f"Until as good as {compared.reference} at its end"
    return Table(title, ("series", *saved_columns, *counted, "pairs"), compared.rows(own, cells), note)


def _spent(costs: Sequence[Spent]) -> tuple[str, str, str]:
    return (
        mean_cell([each.tokens / 1e6 for each in costs], "{:,.2f} M"),
        mean_cell([each.flops for each in costs], "{:.2e}") or NOT_KNOWN,
        mean_cell([each.seconds for each in costs], "{:,.0f}"),
    )


def _saved(costs: Sequence[tuple[Spent | None, Spent]]) -> list[str]:
    return [percent([saved_share(ours, theirs, unit) for ours, theirs in costs]) for unit in UNITS]
