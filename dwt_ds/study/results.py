"""The table of results: final losses, and how much sooner a distilled student is as good as the lone student's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dwt_ds.base.files import MANIFEST
from dwt_ds.config.schema import DataConfig
from dwt_ds.models.flops import Work, forward_flops, meta_model
from dwt_ds.models.load import load_model_config
from dwt_ds.plan.corpus import corpus_of
from dwt_ds.study.records import RunRecord, by_series, mean_and_deviation

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
    "forward passes but not its own training."
)


def results_table(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """A row under RESULTS_HEAD for each series of finished runs."""
    lone = {run.seed: run for run in runs if run.is_alone}
    rows: list[tuple[str, ...]] = []
    for name, group in by_series(runs).items():
        mean, deviation = mean_and_deviation([run.final_loss for run in group])
        cells, seeds = (name, with_deviation(mean, deviation, 4)), str(len(group))
        pairs = [(run, lone[run.seed]) for run in group if run.teacher_run is not None and run.seed in lone]
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
    """Where a run first reaches the held-out loss that the lone student ends with; None: never, or not known."""

    tokens: float | None
    tokens_saved: float | None
    """Share of the lone student's tokens."""
    flops: float | None
    """Operations of training up to there, including the teacher's forward passes but not its own training."""
    flops_saved: float | None
    """Share of the lone student's operations."""


def saving(run: RunRecord, alone: RunRecord) -> Saving:
    """Compare a run with the lone student of its seed; between two evaluations the loss is interpolated linearly."""
    level = alone.final_loss
    losses = [row["eval_hard_loss"] for row in run.held_out]
    tokens = first_reached([row["tokens"] for row in run.held_out], losses, level)
    if tokens is None:
        return Saving(None, None, None, None)
    all_tokens, all_flops = whole_training(alone)
    each = flops_per_token(run)
    flops = None if each is None else tokens * each
    flops_saved = None if flops is None or all_flops is None else 1 - flops / all_flops
    return Saving(tokens, 1 - tokens / all_tokens, flops, flops_saved)


def whole_training(run: RunRecord) -> tuple[float, float | None]:
    """Tokens and operations up to the last evaluation; operations are None if they are not known."""
    tokens, each = float(run.held_out[-1]["tokens"]), flops_per_token(run)
    return tokens, None if each is None else tokens * each


def first_reached(xs: Sequence[float], losses: Sequence[float], level: float) -> float | None:
    """The first x at which `losses`, interpolated linearly, is at `level` or below; None if it never is."""
    for index, loss in enumerate(losses):
        if loss <= level:
            if index == 0 or losses[index - 1] == loss:
                return float(xs[index])
            share = (losses[index - 1] - level) / (losses[index - 1] - loss)
            return float(xs[index - 1] + share * (xs[index] - xs[index - 1]))
    return None


def flops_per_token(run: RunRecord) -> float | None:
    """Operations of training per real token: three passes of the student and one of the teacher.

    None if an export or the data folder is missing.
    """
    data = DataConfig(**run.config["data"])
    teacher = run.config["teacher"]["path"]
    models = [run.path / "export", *([Path(teacher).expanduser()] if teacher else [])]
    needed = [Path(data.dir).expanduser() / MANIFEST, *(model / "config.json" for model in models)]
    if not all(path.is_file() for path in needed):
        return None
    corpus = corpus_of(data)
    all_tokens = run.config["distill"]["soft_positions"] == "all"
    rows = corpus.seq_len if all_tokens else corpus.labels_per_row(data.mask_probability)
    student, *others = (
        forward_flops(meta_model(load_model_config(str(model))), corpus.seq_len, rows, corpus.vocab_size)
        for model in models
    )
    return Work(student, sum(others)).per_row / corpus.tokens_per_row


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
