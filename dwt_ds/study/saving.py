"""How much sooner a student with a teacher is as good as the lone student at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.manifest import MANIFEST_NAME
from dwt_ds.models.build import load_model_config
from dwt_ds.plan.corpus import corpus_of
from dwt_ds.plan.shapes import meta_model
from dwt_ds.plan.speed import Work, forward_flops
from dwt_ds.study.read_run import RunRecord


@dataclass(frozen=True)
class Saving:
    """Where a run first has the held-out loss that the lone student ends with; None: it never has, or not told."""

    tokens: float | None
    tokens_saved: float | None
    """Share of the lone student's tokens."""
    flops: float | None
    """Operations of training up to there, the teacher's forward passes included, its own training not."""
    flops_saved: float | None
    """Share of the lone student's operations."""


def saving(run: RunRecord, alone: RunRecord) -> Saving:
    """Compare with the lone student of the same seed; between two looks at the held-out text the loss is a line."""
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
    """Tokens and operations up to the last look at the held-out text; operations are None if they cannot be told."""
    tokens, each = float(run.held_out[-1]["tokens"]), flops_per_token(run)
    return tokens, None if each is None else tokens * each


def first_reached(xs: Sequence[float], losses: Sequence[float], level: float) -> float | None:
    """The first x at which `losses`, joined by lines, is at `level` or below; None if it never is."""
    for index, loss in enumerate(losses):
        if loss <= level:
            if index == 0 or losses[index - 1] == loss:
                return float(xs[index])
            share = (losses[index - 1] - level) / (losses[index - 1] - loss)
            return float(xs[index - 1] + share * (xs[index] - xs[index - 1]))
    return None


def flops_per_token(run: RunRecord) -> float | None:
    """Operations of training for one real token: the student's three passes, the teacher's one.

    None where an export or the data folder is no longer there.
    """
    data = DataConfig(**run.config["data"])
    teacher = run.config["teacher"]["path"]
    models = [run.path / "export", *([Path(teacher).expanduser()] if teacher else [])]
    if not (Path(data.dir).expanduser() / MANIFEST_NAME).is_file() or not all(
        (m / "config.json").is_file() for m in models
    ):
        return None
    corpus = corpus_of(data)
    everywhere = run.config["distill"]["soft_positions"] == "all"
    rows = corpus.seq_len if everywhere else corpus.labels_per_row(data.mask_probability)
    student, *others = (
        forward_flops(meta_model(load_model_config(str(model))), corpus.seq_len, rows, corpus.vocab_size)
        for model in models
    )
    return Work(student, sum(others)).per_row / corpus.tokens_per_row
