# mypy: allow-untyped-defs
"""The gradients of the linear form without logits in memory, from tiles of logits computed again.

Legend as in ``tile_statistics``; the gradient of a tile is that of ``steps``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwt_kernels.on_triton.constants import (
    FACTOR,
    HARD_GRADIENT,
    RESIDUAL,
    SOFT_GRADIENT,
    STATISTICS,
    STUDENT_MAX,
    STUDENT_SUM,
    STUDENT_TAU_SUM,
    TEACHER_MAX,
    TEACHER_SUM,
)
from dwt_kernels.on_triton.steps import gradient_of
from dwt_kernels.on_triton.tile_statistics import ROW_COUNTS, logits_tile, multiply


@triton.jit(do_not_specialize=ROW_COUNTS)
def tile_gradient_kernel(
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    labels,
    statistics,
    scalars,
    upstream,
    d_hidden,
    d_weight,
    d_bias,
    rows,
    upstream_stride,
    ignore_index,
    V: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    SOFT_ALL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program = tile: its logits again, their gradient dz; dz @ weight, dz.T @ hidden, column sums added atomically.

    d_hidden (N, H), d_weight (V, H) and d_bias (V,) are fp32, zero at the start, None where not wanted.
    """
    # GROUP_ROWS blocks of rows meet all columns before the next ones come: their hidden states stay in the L2 cache,
    # and the weights are read once for each group.
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    column_blocks: tl.constexpr = (V + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    first_row_block = program // (GROUP_ROWS * column_blocks) * GROUP_ROWS
    group_rows = tl.minimum(row_blocks - first_row_block, GROUP_ROWS)
    in_group = program % (GROUP_ROWS * column_blocks)
    row_index = (first_row_block + in_group % group_rows) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column_index = in_group // group_rows * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)

    in_range = row_index < rows
    label = tl.load(labels + row_index, mask=in_range, other=ignore_index)
    labelled = label != ignore_index
    counted = labelled
    if SOFT_ALL:
        counted = in_range
    if tl.max(counted.to(tl.int32), 0) == 0:
        return
    factor = tl.load(scalars + FACTOR).to(tl.float32)
    residual = tl.load(scalars + RESIDUAL).to(tl.float32)
    row_upstream = tl.load(upstream + row_index * upstream_stride, mask=in_range, other=0.0)
    hard_scale = tl.where(labelled, row_upstream * tl.load(scalars + HARD_GRADIENT).to(tl.float32), 0.0)
    row_statistics = statistics + row_index.to(tl.int64) * STATISTICS
    student_max = tl.load(row_statistics + STUDENT_MAX, mask=counted, other=0.0)[:, None]
    student_sum = tl.load(row_statistics + STUDENT_SUM, mask=counted, other=1.0)
    hard, hard_scale = tl.div_rn(hard_scale, student_sum)[:, None], hard_scale[:, None]
    head = student_hidden, student_weight, student_bias
    student = logits_tile(head, rows, STUDENT_WIDTH, row_index, column_index, V, BLOCK_WIDTH, PRECISION)
    teacher, terms = None, (student_max, 0.0, hard, 0.0, 0.0, hard_scale)
    if teacher_hidden is not None:
        soft_scale = tl.where(counted, row_upstream * tl.load(scalars + SOFT_GRADIENT).to(tl.float32), 0.0)
        student_soft = tl.div_rn(soft_scale, tl.load(row_statistics + STUDENT_TAU_SUM, mask=counted, other=1.0))[
            :, None
        ]
        teacher_soft = tl.div_rn(soft_scale, tl.load(row_statistics + TEACHER_SUM, mask=counted, other=1.0))[:, None]
        teacher_max = tl.load(row_statistics + TEACHER_MAX, mask=counted, other=0.0)[:, None]
        terms = student_max, teacher_max, hard, student_soft, teacher_soft, hard_scale
        head = teacher_hidden, teacher_weight, teacher_bias
        teacher = logits_tile(head, rows, TEACHER_WIDTH, row_index, column_index, V, BLOCK_WIDTH, PRECISION)
    gradient = gradient_of(student, teacher, column_index[None, :] == label[:, None], terms, factor, residual)
    # Rows that do not count may hold anything, also infinities: their gradient is 0, not 0 x inf, here and below.
    gradient = tl.where(counted[:, None] & (column_index[None, :] < V), gradient, 0.0)

    if d_bias is not None:
        tl.atomic_add(d_bias + column_index, tl.sum(gradient, 0), mask=column_index < V, sem="relaxed")
    rounded = gradient.to(student_hidden.dtype.element_ty)
    for start in range(0, STUDENT_WIDTH, BLOCK_WIDTH):
        depth = start + tl.arange(0, BLOCK_WIDTH)
        hidden_mask = counted[:, None] & (depth[None, :] < STUDENT_WIDTH)
        weight_mask = (column_index[:, None] < V) & (depth[None, :] < STUDENT_WIDTH)
        hidden_offsets = row_index.to(tl.int64)[:, None] * STUDENT_WIDTH + depth[None, :]
        weight_offsets = column_index.to(tl.int64)[:, None] * STUDENT_WIDTH + depth[None, :]
        if d_hidden is not None:
            weight = tl.load(student_weight + weight_offsets, mask=weight_mask, other=0.0)
            share = multiply(rounded, weight, PRECISION)
            tl.atomic_add(d_hidden + hidden_offsets, share, mask=hidden_mask, sem="relaxed")
        if d_weight is not None:
            hidden = tl.load(student_hidden + hidden_offsets, mask=hidden_mask, other=0.0)
            share = multiply(tl.trans(rounded), hidden, PRECISION)
            tl.atomic_add(d_weight + weight_offsets, share, mask=weight_mask, sem="relaxed")
