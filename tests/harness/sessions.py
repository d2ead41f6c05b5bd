"""A session whose parts do nothing: no models, one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from dwt_ds.config.schema import RunConfig
from dwt_ds.data.batches import Batch
from dwt_ds.distill.objective import LossScalars
from dwt_ds.engine.checkpoint.manifest import RunState
from dwt_ds.run.session import Session, StepNumbers


class Steps(list[list[Batch]]):
    """Batches of each step."""

    def without_teacher(self) -> Steps:
        return Steps([[each._replace(positions=each.positions[: len(each.labels)]) for each in step] for step in self])


def bare_session(config: RunConfig, total_steps: int, *, first_step: int = 0, **parts: Any) -> Session:
    """Its collaborators do nothing, but for those given."""
    student = SimpleNamespace(
        _config=SimpleNamespace(gradient_allreduce_op="mean"),
        gradient_accumulation_steps=lambda: 2,
        get_lr=lambda: [0.125],
        lr_scheduler=None,
        optimizer=SimpleNamespace(),
        module=SimpleNamespace(forward=None),
    )
    nothing = SimpleNamespace(beat=lambda step: None, advance=lambda: None, is_asked=lambda folder: False)
    every = config.train.eval_every
    evaluation = SimpleNamespace(
        is_due=lambda done: done > 0 and every > 0 and done % every == 0, release_teacher=lambda: None
    )
    given = {
        "batches": Steps([[]] * total_steps),
        "evaluation": evaluation,
        "folder": SimpleNamespace(path=None),
        "teacher": None,
        "log": SimpleNamespace(progress=nothing, step=lambda *_, **__: None, teacher_released=lambda *_: None),
        "stop": nothing,
        **parts,
    }
    return Session(
        resolved=SimpleNamespace(config=config, total_steps=total_steps, quantization=None),  # type: ignore[arg-type]
        student=student,
        exporter=nothing,  # type: ignore[arg-type]
        facts=nothing,  # type: ignore[arg-type]
        state=RunState(step=first_step),
        stuck=nothing,  # type: ignore[arg-type]
        **given,
    )


def numbers_of(step: int) -> StepNumbers:
    one = torch.ones(())
    return StepNumbers(step, LossScalars(one, one, one, one, one), 1.0, 1.0, 1e-3, torch.tensor(0))


def batch(labels: list[int], tokens: int, further: int = 0) -> Batch:
    ids, positions = torch.zeros(1, tokens, dtype=torch.int64), torch.arange(len(labels) + further)
    return Batch(ids, None, positions, torch.tensor(labels), tokens, torch.arange(1))
