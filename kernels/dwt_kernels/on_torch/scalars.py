"""The few numbers around the rows: ``Scalars`` from the arguments, losses from ``Statistics``, and their sums.

All in fp64, as there are only some numbers and N rows of them: a mean is then as exact as its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwt_kernels.arguments import Objective
from dwt_kernels.layout import KL_SCALE, LEAST_RESIDUAL, LN_2, LOG2_E, NO_RESIDUAL, Labels, Scalars, Statistics


def compute_scalars(labels: Tensor, objective: Objective) -> Tensor:
    """(8,) fp64, see ``Scalars``."""
    hard = soft = torch.ones((), dtype=torch.float64, device=labels.device)
    temperature = objective.temperature.double()
    if objective.reduction == "mean":
        labelled = (labels != objective.ignore_index).sum()
        counted = torch.full_like(labelled, labels.shape[0]) if objective.soft_all else labelled
        hard = mean_scale(labelled, objective.hard_normalizer)
        soft = mean_scale(counted, objective.soft_normalizer)
    if objective.temperature_squared:
        soft = soft * temperature.square()
    hard_loss, soft_loss = hard * objective.hard_weight, soft * objective.soft_weight
    exponent = LOG2_E / temperature
    nearest = exponent.float()
    below = torch.nextafter(nearest, torch.zeros_like(nearest))
    factor = torch.where(nearest.double() <= exponent, nearest, below).double()
    residual = torch.where(exponent - factor < exponent * LEAST_RESIDUAL, NO_RESIDUAL, exponent - factor)
    scalars = Scalars(hard, soft, hard_loss, soft_loss, hard_loss, soft_loss / temperature, factor, residual)
    return torch.stack(list(scalars))


def mean_scale(count: Tensor, normalizer: Tensor | None) -> Tensor:
    """1 / normalizer, and 0 where no row counts, so that an empty mean is 0 and not NaN."""
    divisor = count if normalizer is None else normalizer
    return torch.where(count == 0, 0.0, 1.0 / divisor.double())


def row_losses(statistics: Tensor, scalars: Tensor, labels: Labels, has_teacher: bool) -> tuple[Tensor, Tensor]:
    """hard (N,) and soft (N,) fp32 from the statistics (N, 7), 0 on rows that do not count.

    In fp64: the soft loss is the sum of two terms that are often larger than it.
    """
    row = Statistics(*statistics.double().unbind(1))
    labelled = labels.labelled
    hard = (row.student_sum.log() - row.label_logit).where(labelled, 0.0).float()
    if not has_teacher:
        return hard, torch.zeros_like(hard)
    named = Scalars(*scalars.unbind())
    exponent = (named.factor + named.residual) / KL_SCALE
    soft = (row.kl_sum / row.teacher_sum * exponent + (row.student_tau_sum / row.teacher_sum).log2()) * LN_2
    # KL >= 0: what rounding leaves below zero is an error of the sums and nothing else. NaN stays NaN.
    soft = soft.clamp(min=0).float()
    return hard, soft if labels.soft_all else soft.where(labelled, 0.0)


def reduce_rows(hard: Tensor, soft: Tensor, scalars: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hard, soft) fp32, each 0-d, or (N,) with "none"; the last two unweighted."""
    hard, soft = hard.double(), soft.double()
    if reduction != "none":
        hard, soft = hard.sum(), soft.sum()
    named = Scalars(*scalars.unbind())
    loss = hard * named.hard_loss + soft * named.soft_loss
    return loss.float(), (hard * named.hard_mean).float(), (soft * named.soft_mean).float()
