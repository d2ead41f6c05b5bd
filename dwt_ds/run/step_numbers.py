"""The numbers of an optimizer step that all ranks share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dwt_ds.distill.objective import LossScalars


@dataclass(frozen=True)
class StepNumbers:
    """What all ranks share in one optimizer step."""

    step: int
    """Counted from 0."""
    scalars: LossScalars
    """Weight, temperature and global counts as the loss takes them."""
    soft_weight: float | Tensor
    """The same weight for the metrics: a number, or 0-d on the device if it is adaptive."""
    temperature: float
    learning_rate: float
    ranks_to_stop: Tensor
    """0-d on the device: how many ranks were asked to stop. Reading it waits for the device."""
    aligned_share: Tensor | None = None
    """0-d on the device: share of the labelled tokens that the soft loss sees, where the teacher has a vocabulary of
    its own; None for the same vocabulary."""
