"""The back end on Triton, for GPUs. ``on_torch`` has the same functions; only this package imports Triton."""

from __future__ import annotations

from dwt_kernels.on_triton.rows import (
    prepare,
    reduce_rows,
    row_gradients,
    row_losses,
    row_statistics,
    row_statistics_and_gradients,
    scaled,
)

__all__ = [
    "prepare",
    "reduce_rows",
    "row_gradients",
    "row_losses",
    "row_statistics",
    "row_statistics_and_gradients",
    "scaled",
]
