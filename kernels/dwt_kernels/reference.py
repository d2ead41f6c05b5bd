"""The objective straight from its formula, in fp64: what every test compares with. Slow and plain on purpose."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_rows(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """hard (N,) = -log softmax(z_s)[y] and soft (N,) = sum_v p_t log(p_t / p_s) at tau, fp64, differentiable in z_s.

    hard is 0 where the label is ``ignore_index``; soft is given for every row (0 without a teacher).
    """
    student = student_logits.double()
    labelled = labels != ignore_index
    log_probability = torch.log_softmax(student, 1)
    hard = -log_probability.gather(1, labels.where(labelled, 0).unsqueeze(1)).squeeze(1)
    hard = hard.where(labelled, 0.0)
    if teacher_logits is None:
        return hard, torch.zeros_like(hard)
    teacher_log = torch.log_softmax(teacher_logits.double() / temperature, 1)
    student_log = torch.log_softmax(student / temperature, 1)
    probability = teacher_log.exp()
    # p log p -> 0 as p -> 0
    terms = torch.where(probability > 0, probability * (teacher_log - student_log), 0.0)
    return hard, terms.sum(1)


def reference_distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    ignore_index: int = -100,
    soft_positions: str = "labelled",
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    normalizer: float | tuple[float, float] | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hard, soft) as ``distill_loss`` defines them, in fp64."""
    student_logits = student_logits[:, :vocab_size]
    teacher_logits = None if teacher_logits is None else teacher_logits[:, :vocab_size]
    hard, soft = reference_rows(student_logits, teacher_logits, labels, temperature, ignore_index)
    if temperature_squared:
        soft = soft * temperature**2
    return reference_reduction(
        hard,
        soft,
        labels,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        ignore_index=ignore_index,
        soft_positions=soft_positions,
        normalizer=normalizer,
        reduction=reduction,
    )


def reference_reduction(
    hard: Tensor,
    soft: Tensor,
    labels: Tensor,
    *,
    hard_weight: float,
    soft_weight: float,
    ignore_index: int,
    soft_positions: str,
    normalizer: float | tuple[float, float] | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hard, soft) from the rows' losses (N,), fp64."""
    labelled = labels != ignore_index
    counted = torch.ones_like(labelled) if soft_positions == "all" else labelled
    hard, soft = hard.where(labelled, 0.0), soft.where(counted, 0.0)
    if reduction != "none":
        hard, soft = hard.sum(), soft.sum()
    if reduction == "mean":
        divisors = max(float(labelled.sum()), 1.0), max(float(counted.sum()), 1.0)
        if normalizer is not None:
            divisors = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)
        hard, soft = hard / divisors[0], soft / divisors[1]
    return hard_weight * hard + soft_weight * soft, hard, soft
