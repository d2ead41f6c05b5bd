"""Held-out losses, as exact means over all validation labels of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from dwt_kernels import DistillLoss, linear_distill_loss
from torch import Tensor

from dwt_ds.distill.objective import LossScale, MicroBatch, TeacherView


class HeldOut(NamedTuple):
    """Means over the labelled tokens of the validation rows; NaN without any."""

    hard_loss: float
    soft_loss: float


@torch.no_grad()
def held_out_loss(
    objective: Callable[[MicroBatch, TeacherView | None, LossScale], DistillLoss],
    teacher: Callable[[MicroBatch], TeacherView] | None,
    batches: Iterable[MicroBatch],
    temperature: float,
    add_up: Callable[[Tensor], Tensor],
    device: torch.device,
) -> HeldOut:
    """Cross-entropy and KL divergence of the student on held-out micro-batches.

    Args:
        objective: the student with its loss, in evaluation mode.
        teacher: None for a student that trains alone; its soft loss is 0.
        batches: this rank's micro-batches, already on `device`.
        temperature: of the soft loss.
        add_up: sums a tensor over the ranks.
        device: of the sums.
    """
    one = torch.ones((), device=device)
    scale = LossScale(one, torch.tensor(temperature, device=device), hard_rows=one, soft_rows=one)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        loss = objective(batch, teacher(batch) if teacher else None, scale)
        sums += torch.stack([loss.hard.double(), loss.soft.double(), (batch.labels >= 0).sum().double()])
    hard, soft, count = add_up(sums).tolist()
    return HeldOut(hard / count, soft / count) if count else HeldOut(float("nan"), float("nan"))


@torch.no_grad()
def teacher_held_out_loss(
    teacher: Callable[[MicroBatch], TeacherView],
    batches: Iterable[MicroBatch],
    vocab_size: int,
    add_up: Callable[[Tensor], Tensor],
    device: torch.device,
) -> float:
    """Masked-token cross-entropy of the teacher itself; NaN without a labelled token."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        view = teacher(batch)
        head = (view.hidden, view.weight, view.bias)
        loss = linear_distill_loss(*head, None, None, None, batch.labels, vocab_size=vocab_size, reduction="sum")
        sums += torch.stack([loss.hard.double(), (batch.labels >= 0).sum().double()])
    hard, count = add_up(sums).tolist()
    return hard / count if count else float("nan")
