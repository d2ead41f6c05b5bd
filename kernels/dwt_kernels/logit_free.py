"""Launches the kernels that never store a logit; same arguments and results as ``linear_chunked``.

Extra memory: fp32 sums of the gradients, 28 bytes a row and share of the columns. The price: both products run twice,
2 N V (4 H_s + 2 H_t) operations against 2 N V (3 H_s + H_t), and the sums are atomic, so that their last bits depend on
the order in which programs arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dwt_kernels.layout import STATISTICS, Labels
from dwt_kernels.linear_chunked import Head
from dwt_kernels.on_triton.launch import cdiv, launch, next_power_of_2, row_stride
from dwt_kernels.on_triton.tile_gradient import tile_gradient_kernel
from dwt_kernels.on_triton.tile_statistics import merge_kernel, tile_statistics_kernel

# Programs of the statistics kernel for each multiprocessor: enough to even out the last wave.
PROGRAMS_PER_PROCESSOR = 4

# Splits that a program of the merge kernel loads: this many, one for each thread, or the next power of two. So few
# kernels are compiled for any number of rows.
LEAST_SPLITS_BLOCK = 128

# Row blocks that share the weights' tiles in the L2 cache; 16 of 64 rows at H = 2048 + 4096 in 16 bits are 13 MB.
GROUP_ROWS = 16


class TileShape(NamedTuple):
    rows: int
    columns: int
    width: int
    num_warps: int
    num_stages: int


def tile_shape(*dtypes: torch.dtype) -> TileShape:
    """For operands of these dtypes.

    Two fp32 accumulators of 64 x 128 on 8 warps take 64 registers a thread; 128 x 128 spills on every target.

    AMD's 64 KiB of shared memory hold two stages of the pipeline, NVIDIA's three. fp32 operands take twice the room.
    """
    stages = 2 if torch.version.hip else 3
    if torch.float32 in dtypes:
        return TileShape(64, 64, 32, 8, stages)
    return TileShape(64, 128, 64, 8, stages)


def logit_free_statistics_and_gradients(
    student: Head,
    teacher: Head | None,
    labels: Labels,
    upstream: Tensor,
    scalars: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Statistics (N, 7), and the fp32 gradients of student hidden, weight and bias (None where not ``needed``)."""
    if torch.are_deterministic_algorithms_enabled():
        raise RuntimeError('memory="logit_free" adds atomically and is not deterministic; use memory="chunked"')
    heads = [None if tensor is None else tensor.contiguous() for tensor in (*student, *(teacher or (None, None, None)))]
    label_values = labels.values.contiguous()
    rows, columns, device = label_values.shape[0], student.weight.shape[0], label_values.device
    statistics = torch.empty(rows, STATISTICS, dtype=torch.float32, device=device)
    sums = [
        torch.zeros(tensor.shape, dtype=torch.float32, device=device) if need and tensor is not None else None
        for tensor, need in zip(student, needed)
    ]
    d_hidden, d_weight, d_bias = sums
    if rows == 0:
        return statistics, d_hidden, d_weight, d_bias
    tile = tile_shape(*(head.hidden.dtype for head in (student, teacher) if head is not None))
    row_blocks, column_blocks = cdiv(rows, tile.rows), cdiv(columns, tile.columns)
    blocks_per_split = cdiv(column_blocks * row_blocks, processors(device) * PROGRAMS_PER_PROCESSOR)
    blocks_per_split = min(blocks_per_split, column_blocks)
    splits = cdiv(column_blocks, blocks_per_split)
    partials = torch.empty(rows, splits, STATISTICS, dtype=torch.float32, device=device)
    constants = {
        "V": columns,
        "STUDENT_WIDTH": student.hidden.shape[1],
        "TEACHER_WIDTH": 0 if teacher is None else teacher.hidden.shape[1],
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_WIDTH": tile.width,
        "SOFT_ALL": labels.soft_all,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
    launch(
        tile_statistics_kernel,
        (row_blocks, splits),
        *heads,
        label_values,
        scalars,
        partials,
        rows,
        labels.ignore_index,
        blocks_per_split * tile.columns,
        splits,
        **constants,
    )
    launch(
        merge_kernel,
        (rows,),
        partials,
        label_values,
        scalars,
        statistics,
        labels.ignore_index,
        splits,
        SPLITS_BLOCK=max(LEAST_SPLITS_BLOCK, next_power_of_2(splits)),
        HAS_TEACHER=teacher is not None,
        SOFT_ALL=labels.soft_all,
    )
    if any(needed):
        launch(
            tile_gradient_kernel,
            (row_blocks * column_blocks,),
            *heads,
            label_values,
            statistics,
            scalars,
            upstream,
            d_hidden,
            d_weight,
            d_bias,
            rows,
            row_stride(upstream),
            labels.ignore_index,
            GROUP_ROWS=GROUP_ROWS,
            **constants,
        )
    return statistics, d_hidden, d_weight, d_bias


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; on a CPU, in the interpreter, one: small tests then have splits of several tiles."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
