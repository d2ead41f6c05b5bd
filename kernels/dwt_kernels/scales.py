"""From rows to the reported losses: weights, counts or normalizers, tau squared.

In fp64, as there are only N of them: so a mean is as exact as its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwt_kernels.arguments import Objective


def loss_scales(labels: Tensor, objective: Objective) -> Tensor:
    """(4,) fp64. [0:2] turn summed hard and soft rows into the reported losses; [2:4] also hold the weights."""
    hard = soft = torch.ones((), dtype=torch.float64, device=labels.device)
    if objective.reduction == "mean":
        labelled = (labels != objective.ignore_index).sum()
        counted = torch.full_like(labelled, labels.shape[0]) if objective.soft_all else labelled
        hard = mean_scale(labelled, objective.hard_normalizer)
        soft = mean_scale(counted, objective.soft_normalizer)
    if objective.temperature_squared:
        soft = soft * objective.temperature.double().square()
    return torch.stack([hard, soft, hard * objective.hard_weight, soft * objective.soft_weight])


def mean_scale(count: Tensor, normalizer: Tensor | None) -> Tensor:
    """1 / normalizer, and 0 where no row counts, so that an empty mean is 0 and not NaN."""
    divisor = count if normalizer is None else normalizer
    return torch.where(count == 0, 0.0, 1.0 / divisor.double())


def reduce_rows(hard: Tensor, soft: Tensor, scales: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hard, soft) fp32, each 0-d, or (N,) with "none"; the last two unweighted."""
    hard, soft = hard.double(), soft.double()
    if reduction != "none":
        hard, soft = hard.sum(), soft.sum()
    return (
        (hard * scales[2] + soft * scales[3]).float(),
        (hard * scales[0]).float(),
        (soft * scales[1]).float(),
    )
