"""Steps, tokens, operations and hours of a study's runs, before they are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dwt_ds.models.build import build_student
from dwt_ds.models.masked_lm import GatheredMaskedLM
from dwt_ds.plan.hardware import find_device
from dwt_ds.plan.settings import Settings, settle
from dwt_ds.plan.simulation import forward_flops
from dwt_ds.plan.speed import Work
from dwt_ds.study.grid import StudyRun


@dataclass(frozen=True)
class Cost:
    """What a run takes."""

    steps: int
    tokens: float
    """Real tokens, all ranks."""
    flops: float
    """Operations of training; looks at the held-out text are not counted."""
    hours: float


def estimate(
    runs: Sequence[StudyRun], recipes: Mapping[str, Path], overrides: Sequence[str], ranks: int, gpu: str
) -> dict[str, Cost]:
    """Cost of each run, by name.

    Args:
        recipes: of each run, by name.
        overrides: `key=value`, on top of all recipes.
        ranks: processes of a run.
        gpu: a device's name in dwt_ds/plan/hardware.py; its rate and the share of it that training reaches are taken
            from there.

    Raises:
        ValueError, OSError: a recipe that makes no run; one line.
    """
    device = find_device(gpu, ranks)
    settled = {run.name: settle(str(recipes[run.name]), list(overrides), None, ranks) for run in runs}
    by_shape: dict[str, int] = {}  # most runs of a study have one student
    flops = {}
    for name, settings in settled.items():
        shape = repr((replace(settings.config.student, init="random"), settings.corpus, settings.labels_per_row))
        if shape not in by_shape:
            by_shape[shape] = student_forward_flops(settings)
        flops[name] = by_shape[shape]
    costs = {}
    for run in runs:
        settings = settled[run.name]
        work = Work(flops[run.name], flops[run.teacher_run] if run.teacher_run else 0)
        rows = settings.total_steps * settings.rows_per_step
        total = float(rows * work.per_row)
        rate = ranks * device.mfu * device.flops_per_second(settings.ds.precision)
        costs[run.name] = Cost(settings.total_steps, rows * settings.corpus.tokens_per_row, total, total / rate / 3600)
    return costs


def student_forward_flops(settings: Settings) -> int:
    """Operations of the student's forward pass over one row."""
    corpus = settings.corpus
    sizes = {"vocab_size": corpus.vocab_size, "seq_len": corpus.seq_len, "pad_token_id": corpus.pad_token_id}
    with torch.device("meta"):
        student = GatheredMaskedLM(build_student(settings.config.student, **sizes))
    return forward_flops(student, corpus.seq_len, settings.labels_per_row, corpus.vocab_size)
