"""The table of results: final losses, and how much sooner a distilled student is as good as the lone student's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dwt_ds.config.recipe import parse_run_config
from dwt_ds.models.flops import Work, meta_model, work_of_a_row
from dwt_ds.plan.vocabulary import find_overlap
from dwt_ds.study.models import data_of, student_config, teacher_config
from dwt_ds.study.records import RunRecord, by_series, mean_and_deviation, pairs_with_alone

RESULTS_HEAD = (
    "series",
    "held-out MLM loss",
    "minus the lone student's",
    "tokens to its final loss",
    "tokens saved",
    "FLOPs to its final loss",
    "FLOPs saved",
    "seeds",
)
RESULTS_NOTE = (
    "Losses in nats per masked token, lower is better; ± one standard deviation over seeds (n - 1). Differences are "
    "taken seed by seed: runs with equal seeds see equal data in equal order. The lone student's row has the tokens "
    "and FLOPs of its whole training; the other rows say what share of them is saved. FLOPs include the teacher's "
    "forward passes until it is released, but not its own training."
)


def results_table(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """A row under RESULTS_HEAD for each series of finished runs."""
    rows: list[tuple[str, ...]] = []
    for name, group in by_series(runs).items():
        mean, deviation = mean_and_deviation([run.final_loss for run in group])
        cells, seeds = (name, with_deviation(mean, deviation, 4)), str(len(group))
        pairs = pairs_with_alone(group, runs)
        if not pairs:
            costs = [whole_training(run) for run in group if run.is_alone]
            tokens, flops = [each[0] for each in costs], [each[1] for each in costs]
            rows.append((*cells, "", _tokens(tokens), "", _flops(flops), "", seeds))
            continue
        difference = mean_and_deviation([run.final_loss - other.final_loss for run, other in pairs])
        savings = [saving(run, other) for run, other in pairs]
        rows.append((*cells, with_deviation(*difference, 4, sign=True), *_saving_cells(savings), seeds))
    return rows


@dataclass(frozen=True)
class Saving:
    """Where a run first reaches the held-out loss that another ends with; None: never, or not known."""

    tokens: float | None
    tokens_saved: float | None
    """Share of the other's tokens; below 0 where the run needs more."""
    flops: float | None
    """Operations of training up to there, with the teacher's forward passes until its release, not its training."""
    flops_saved: float | None
    """Share of the other's operations."""
    seconds: float | None
    """Of training, evaluations and checkpoints before that point included."""
    seconds_saved: float | None
    """Share of the other's seconds."""


def saving(run: RunRecord, other: RunRecord) -> Saving:
    """Compare a run with another, such as the lone student of its seed, at the point of its curve where it is as good.

    Between two evaluations the loss is interpolated linearly.
    """
    losses = [row["eval_hard_loss"] for row in run.held_out]
    tokens, seconds = (
        first_reached([row[x] for row in run.held_out], losses, other.final_loss) for x in ("tokens", "elapsed_seconds")
    )
    if tokens is None or seconds is None:
        return Saving(None, None, None, None, None, None)
    all_tokens, all_flops = whole_training(other)
    flops = flops_until(run, tokens)
    return Saving(
        tokens,
        _saved(tokens, all_tokens),
        flops,
        _saved(flops, all_flops),
        seconds,
        _saved(seconds, float(other.held_out[-1]["elapsed_seconds"])),
    )


def _saved(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else 1 - ours / theirs


def whole_training(run: RunRecord) -> tuple[float, float | None]:
    """Tokens and operations up to the last evaluation; operations are None if they are not known."""
    tokens = float(run.held_out[-1]["tokens"])
    return tokens, flops_until(run, tokens)


def first_reached(xs: Sequence[float], losses: Sequence[float], level: float) -> float | None:
    """The first x at which `losses`, interpolated linearly, is at `level` or below; None if it never is."""
    for index, loss in enumerate(losses):
        if loss <= level:
            if index == 0 or losses[index - 1] == loss:
                return float(xs[index])
            share = (losses[index - 1] - level) / (losses[index - 1] - loss)
            return float(xs[index - 1] + share * (xs[index] - xs[index - 1]))
    return None


def flops_until(run: RunRecord, tokens: float) -> float | None:
    """Operations of the first `tokens` real tokens of a run; the teacher's only while it took part.

    None if they are not known.
    """
    work = work_per_token(run)
    if work is None:
        return None
    alone = replace(work, teacher_forward=0.0)
    taught_tokens = min(tokens, float(run.tokens_with_teacher))
    return taught_tokens * work.per_row + (tokens - taught_tokens) * alone.per_row


def work_per_token(run: RunRecord) -> Work | None:
    """Operations of training per real token while the teacher takes part.

    None if the data folder or the configuration of a model is missing.
    """
    config = parse_run_config(run.config)
    student, teacher = student_config(run), teacher_config(run)
    if student is None or (run.has_teacher and teacher is None):
        return None
    corpus = data_of(run)
    if corpus is None:
        return None
    all_tokens = config.distill.soft_positions == "all"
    overlap = None if teacher is None else find_overlap(config, corpus.vocab_size, teacher)[0]
    a_row = work_of_a_row(
        meta_model(student),
        None if teacher is None else meta_model(teacher),
        seq_len=corpus.seq_len,
        labels=corpus.seq_len if all_tokens else corpus.labels_per_row(config.data.mask_probability),
        vocab_size=corpus.vocab_size,
        overlap=overlap,
    )
    return Work(a_row.student_forward / corpus.tokens_per_row, a_row.teacher_forward / corpus.tokens_per_row)


def with_deviation(mean: float, deviation: float | None, digits: int, unit: str = "", *, sign: bool = False) -> str:
    """`5.4690 ± 0.0390`, or the mean alone where there is no deviation."""
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{mean:{'+' if sign else ''}.{digits}f}{spread}{unit}"


def _saving_cells(savings: Sequence[Saving]) -> tuple[str, str, str, str]:
    tokens = [each.tokens for each in savings if each.tokens is not None]
    if len(tokens) < len(savings):
        return ("never" if not tokens else f"{len(tokens)} of {len(savings)} seeds", "", "", "")
    shares = _share([each.tokens_saved for each in savings]), _share([each.flops_saved for each in savings])
    return _tokens(tokens), shares[0], _flops([each.flops for each in savings]), shares[1]


def _tokens(values: Sequence[float]) -> str:
    return f"{mean_and_deviation(values)[0] / 1e6:,.2f} M" if values else ""


def _flops(values: Sequence[float | None]) -> str:
    known = [each for each in values if each is not None]
    if len(known) < len(values):
        return "not known"
    return f"{mean_and_deviation(known)[0]:.2e}" if known else ""


def _share(values: Sequence[float | None]) -> str:
    known = [100 * each for each in values if each is not None]
    return with_deviation(*mean_and_deviation(known), 0, "%") if len(known) == len(values) else "not known"
