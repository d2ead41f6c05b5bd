"""Bytes on disk of a checkpoint and of the exported model."""

from __future__ import annotations

from dwt_ds.plan.zero import Partition, ZeroSettings


def checkpoint_bytes(stage: int, zero: ZeroSettings, partition: Partition, frozen_bytes: int) -> int:
    """All ranks' files together: weights in the training precision, fp32 master weights, optimizer state.

    Stage 3 writes no weights besides the master weights, of which they are made again.
    """
    master = 0 if stage == 0 and zero.precision == "fp32" else 4
    if stage == 0:
        elements = partition.elements
    else:
        elements = (partition.shards if stage == 3 else partition.share) * partition.ranks
    weights = 0 if stage == 3 else partition.elements
    return zero.element_bytes * weights + (master + 4 * zero.moments) * elements + frozen_bytes


def export_bytes(parameters: int) -> int:
    """The exported model is fp32, tied weights once."""
    return 4 * parameters
