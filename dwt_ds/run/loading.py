"""Batches of the data room as the loop takes them."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from dwt_ds.config.schema import RunConfig
from dwt_ds.data.batches import Batch, StepBatches
from dwt_ds.engine import ranks


def step_loader(batches: StepBatches, first_step: int, total_steps: int, config: RunConfig) -> DataLoader[list[Batch]]:
    """Loads steps in order, in worker processes if the recipe asks for them.

    Its generator is private: a loader that drew from the global one would disturb dropout after a resume.
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step, total_steps),
        num_workers=config.data.workers,
        pin_memory=ranks.device().type == "cuda",
        generator=torch.Generator().manual_seed(0),
    )
