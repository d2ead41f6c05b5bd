"""Cost of a training up to some point, and of its teacher's training: tokens, operations, seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dwt_ds.base.run_files import EXPORT, RECIPE
from dwt_ds.config.recipe import parse_run_config
from dwt_ds.models.flops import Work, meta_model
from dwt_ds.plan.vocabulary import measure_overlap
from dwt_ds.run.mfu import row_work
from dwt_ds.study.models import data_of, student_config, teacher_config
from dwt_ds.study.records import RunRecord

# Cached by everything it depends on: counting is slow, and the runs of a study share a few models.
_works: dict[str, Work] = {}


@dataclass(frozen=True)
class Spent:
    """Cost of a training."""

    tokens: float
    """Real tokens, all ranks."""
    flops: float | None
    """Operations, with the teacher's forward passes until its release; None: not known."""
    seconds: float
    """Evaluations and checkpoints included."""

    def __add__(self, other: Spent) -> Spent:
        flops = None if self.flops is None or other.flops is None else self.flops + other.flops
        return Spent(self.tokens + other.tokens, flops, self.seconds + other.seconds)


UNITS = ("tokens", "flops", "seconds")
"""Fields of `Spent`."""


def saved_share(ours: Spent | None, theirs: Spent, unit: str) -> float | None:
    """Share of another training's cost that is saved; below 0 if this one costs more, None if not known."""
    mine, whole = getattr(ours, unit, None), getattr(theirs, unit)
    return None if mine is None or not whole else 1 - mine / whole


def whole_training(run: RunRecord) -> Spent:
    """Up to the last evaluation."""
    return spent_until(run, float(run.held_out[-1]["tokens"]))


def spent_until(run: RunRecord, tokens: float) -> Spent:
    """Cost of the first `tokens` real tokens of a run, without its teacher's training."""
    seconds, work = run.along("tokens", tokens, "elapsed_seconds"), work_per_token(run)
    if work is None:
        return Spent(tokens, None, seconds)
    taught_tokens, alone = run.with_teacher("tokens", tokens), work.without_teacher()
    return Spent(tokens, taught_tokens * work.per_row + (tokens - taught_tokens) * alone.per_row, seconds)


def teacher_training(run: RunRecord) -> Spent | None:
    """Cost of training a run's teacher, and that teacher's own teacher; None without one, or if it is not known.

    In a study the teacher is a run beside this one. Otherwise it is known if `teacher.path` is RUN/export, or
    RUN/export/step_XXXXXXXX for a teacher taken before the end of its training.
    """
    if not run.has_teacher:
        return None
    known = None if run.teacher_run is None else run.path.parent / run.teacher_run / EXPORT
    export = known or Path(run.config["teacher"]["path"]).expanduser()
    step = None
    if export.name.startswith("step_"):
        step, export = int(export.name.removeprefix("step_")), export.parent
    trainer = RunRecord(export.parent.name, export.parent)
    if export.name != EXPORT or not (trainer.path / RECIPE).is_file() or not trainer.training:
        return None
    tokens = trainer.training[-1]["tokens"] if step is None else trainer.along("step", step, "tokens")
    own = spent_until(trainer, tokens)
    if not trainer.has_teacher:
        return own
    earlier = teacher_training(trainer)
    return None if earlier is None else own + earlier


def work_per_token(run: RunRecord) -> Work | None:
    """Operations of training per real token, with the teacher; None if data, or the config of a model, are missing."""
    config = parse_run_config(run.config)
    student, teacher = student_config(run), teacher_config(run)
    if student is None or (run.has_teacher and teacher is None):
        return None
    corpus = data_of(run)
    if corpus is None:
        return None
    overlap = run.overlap
    if overlap is None and teacher is not None and config.teacher.vocabulary == "shared":
        try:
            overlap = measure_overlap(config, teacher)  # runs of earlier versions did not write it down
        except (FileNotFoundError, ValueError):
            return None
    labels, hidden_loss = config.data.mask_probability, config.distill.hidden_weight > 0
    sizes = labels, config.distill.soft_positions, hidden_loss, corpus, overlap
    key = repr((student.to_json_string(), teacher and teacher.to_json_string(), sizes))
    if key not in _works:
        models = meta_model(student), None if teacher is None else meta_model(teacher)
        _works[key] = row_work(config, corpus, *models, overlap)
    return _works[key].per_token(corpus.tokens_per_row)
