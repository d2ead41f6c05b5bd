"""Held-out losses, as exact means over all validation labels of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from dwt_kernels import DistillLoss, linear_distill_loss
from torch import Tensor

from dwt_ds.config.schema import DistillConfig
from dwt_ds.data.batches import Batch
from dwt_ds.distill.objective import LossScale, TeacherView


class HeldOut(NamedTuple):
    """Means over the labelled tokens of the validation rows."""

    hard_loss: float
    soft_loss: float


@torch.no_grad()
def held_out_loss(
    objective: Callable[[Batch, TeacherView | None, LossScale], DistillLoss],
    teacher: Callable[[Batch], TeacherView] | None,
    batches: Iterable[Batch],
    temperature: float,
    reduce_sum: Callable[[Tensor], Tensor],
    device: torch.device,
) -> HeldOut | None:
    """Cross-entropy and KL divergence of the student on held-out micro-batches; None where these have no label.

    Args:
        objective: the student with its loss, in evaluation mode.
        teacher: None for a student that trains alone; its soft loss is 0.
        batches: this rank's micro-batches, already on `device`.
        temperature: of the soft loss.
        reduce_sum: sums a tensor over the ranks.
        device: of the sums.
    """
    one = torch.ones((), device=device)
    scale = LossScale(one, torch.tensor(temperature, device=device), hard_rows=one, soft_rows=one)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        loss = objective(batch, teacher(batch) if teacher else None, scale)
        sums += torch.stack([loss.hard.double(), loss.soft.double(), (batch.labels >= 0).sum().double()])
    hard, soft, count = reduce_sum(sums).tolist()
    return HeldOut(hard / count, soft / count) if count else None


@torch.no_grad()
def teacher_held_out_loss(
    teacher: Callable[[Batch], TeacherView],
    batches: Iterable[Batch],
    vocab_size: int,
    config: DistillConfig,
    reduce_sum: Callable[[Tensor], Tensor],
    device: torch.device,
) -> float:
    """Masked-token cross-entropy of the teacher itself, nats; NaN without a labelled token.

    Args:
        teacher: gives its hidden states and head.
        batches: this rank's micro-batches, already on `device`.
        vocab_size: tokens in the vocabulary; further columns of the head get no probability.
        config: the loss kernel is the student's.
        reduce_sum: sums a tensor over the ranks.
        device: of the sums.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        view = teacher(batch)
        loss = linear_distill_loss(
            *(view.hidden, view.weight, view.bias),
            *(None, None, None),
            batch.labels,
            vocab_size=vocab_size,
            reduction="sum",
            backend=config.backend,
            memory=config.memory,
        )
        sums += torch.stack([loss.hard.double(), (batch.labels >= 0).sum().double()])
    hard, count = reduce_sum(sums).tolist()
    return hard / count if count else float("nan")
