"""The back end on plain torch, for CPUs and for GPUs without Triton. ``on_triton`` has the same functions."""

from __future__ import annotations

from dwt_kernels.on_torch.blocks import scaled
from dwt_kernels.on_torch.rows import prepare, row_gradients, row_statistics, row_statistics_and_gradients
from dwt_kernels.on_torch.scalars import reduce_rows, row_losses

__all__ = [
    "prepare",
    "reduce_rows",
    "row_gradients",
    "row_losses",
    "row_statistics",
    "row_statistics_and_gradients",
    "scaled",
]
