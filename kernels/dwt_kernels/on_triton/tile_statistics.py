# mypy: allow-untyped-defs
"""The rows' statistics without logits in memory: tiles of both models' logits live in registers.

Legend: N rows, V vocabulary columns, H hidden widths; a tile is BLOCK_ROWS x BLOCK_COLUMNS logits. The recurrence is
that of ``steps``, on tiles and with a running state for each row. ``tile_gradient`` computes the tiles once more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwt_kernels.on_triton.constants import (
    FACTOR,
    INTERPRETED,
    KL_SUM,
    LABEL_LOGIT,
    MINUS_INF,
    RESIDUAL,
    STATISTICS,
    STUDENT_MAX,
    STUDENT_SUM,
    STUDENT_TAU_SUM,
    TEACHER_MAX,
    TEACHER_SUM,
)
from dwt_kernels.on_triton.steps import add_block, merged

# These change with the number of rows. Triton would otherwise compile variants for 1 and for multiples of 16.
ROW_COUNTS = ("rows", "splits")


@triton.jit
def multiply(left, right, PRECISION: tl.constexpr):
    """left @ right in fp32."""
    if INTERPRETED:  # it multiplies bf16 as if it were integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def logits_tile(
    head,
    rows,
    WIDTH: tl.constexpr,
    row_index,
    column_index,
    V: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """fp32 logits of a tile, -inf past column V.

    ``head``: (hidden (N, WIDTH), weight (V, WIDTH), bias (V,) or None).
    """
    hidden, weight, bias = head
    logits = tl.zeros((row_index.shape[0], column_index.shape[0]), tl.float32)
    hidden_rows = hidden + row_index.to(tl.int64)[:, None] * WIDTH
    weight_rows = weight + column_index.to(tl.int64)[None, :] * WIDTH
    for start in range(0, WIDTH, BLOCK_WIDTH):
        depth = start + tl.arange(0, BLOCK_WIDTH)
        left = tl.load(
            hidden_rows + depth[None, :], mask=(row_index[:, None] < rows) & (depth[None, :] < WIDTH), other=0.0
        )
        right = tl.load(
            weight_rows + depth[:, None], mask=(column_index[None, :] < V) & (depth[:, None] < WIDTH), other=0.0
        )
        logits += multiply(left, right, PRECISION)
    if bias is not None:
        logits += tl.load(bias + column_index, mask=column_index < V, other=0.0).to(tl.float32)[None, :]
    return tl.where(column_index[None, :] < V, logits, MINUS_INF)


@triton.jit(do_not_specialize=ROW_COUNTS)
def tile_statistics_kernel(
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    labels,
    scalars,
    partials,
    rows,
    ignore_index,
    columns_per_split,
    splits,
    V: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SOFT_ALL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program = (block of rows, share of the columns): the rows' state over those, (N, splits, 7) fp32.

    Such a state has the fields of ``layout.Statistics``, but its label's logit is not centred.
    """
    row_index = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    label = tl.load(labels + row_index, mask=row_index < rows, other=ignore_index)
    counted = label != ignore_index
    if SOFT_ALL:
        counted = row_index < rows
    if tl.max(counted.to(tl.int32), 0) == 0:
        return
    factor = tl.load(scalars + FACTOR).to(tl.float32)
    residual = tl.load(scalars + RESIDUAL).to(tl.float32)
    zeros = tl.zeros((BLOCK_ROWS,), tl.float32)
    state = zeros + MINUS_INF, zeros, zeros, zeros + MINUS_INF, zeros, zeros
    label_logit = zeros
    start = tl.program_id(1) * columns_per_split
    stop = tl.minimum(start + columns_per_split, V)
    while start < stop:
        column_index = start + tl.arange(0, BLOCK_COLUMNS)
        head = student_hidden, student_weight, student_bias
        student = logits_tile(head, rows, STUDENT_WIDTH, row_index, column_index, V, BLOCK_WIDTH, PRECISION)
        label_logit += tl.sum(tl.where(column_index[None, :] == label[:, None], student, 0.0), 1)
        teacher = None
        if teacher_hidden is not None:
            head = teacher_hidden, teacher_weight, teacher_bias
            teacher = logits_tile(head, rows, TEACHER_WIDTH, row_index, column_index, V, BLOCK_WIDTH, PRECISION)
        state = add_block(state, student, teacher, factor, residual, 1, BLOCK_ROWS, BLOCK_COLUMNS, False)
        start += BLOCK_COLUMNS
    student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = state
    out = partials + (row_index.to(tl.int64) * splits + tl.program_id(1)) * STATISTICS
    in_range = row_index < rows
    tl.store(out + STUDENT_MAX, student_max, mask=in_range)
    tl.store(out + STUDENT_SUM, student_sum, mask=in_range)
    tl.store(out + STUDENT_TAU_SUM, student_tau_sum, mask=in_range)
    tl.store(out + TEACHER_MAX, teacher_max, mask=in_range)
    tl.store(out + TEACHER_SUM, teacher_sum, mask=in_range)
    tl.store(out + KL_SUM, kl_sum, mask=in_range)
    tl.store(out + LABEL_LOGIT, label_logit, mask=in_range)


@triton.jit(do_not_specialize=ROW_COUNTS)
def merge_kernel(
    partials,
    labels,
    scalars,
    statistics,
    ignore_index,
    splits,
    SPLITS_BLOCK: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SOFT_ALL: tl.constexpr,
):
    """Program = row: its statistics (N, 7) from the states of its ``splits`` <= SPLITS_BLOCK shares of columns."""
    row = tl.program_id(0).to(tl.int64)
    if not SOFT_ALL and tl.load(labels + row) == ignore_index:
        return
    factor = tl.load(scalars + FACTOR).to(tl.float32)
    residual = tl.load(scalars + RESIDUAL).to(tl.float32)
    split = tl.arange(0, SPLITS_BLOCK)
    state = partials + (row * splits + split) * STATISTICS
    present = split < splits
    zeros = tl.zeros((SPLITS_BLOCK,), tl.float32)
    student_max = tl.load(state + STUDENT_MAX, mask=present, other=MINUS_INF)
    student_sum = tl.load(state + STUDENT_SUM, mask=present, other=0.0)
    student_tau_sum, teacher_max, teacher_sum, kl_sum = zeros, zeros, zeros, zeros
    if HAS_TEACHER:
        student_tau_sum = tl.load(state + STUDENT_TAU_SUM, mask=present, other=0.0)
        teacher_max = tl.load(state + TEACHER_MAX, mask=present, other=MINUS_INF)
        teacher_sum = tl.load(state + TEACHER_SUM, mask=present, other=0.0)
        kl_sum = tl.load(state + KL_SUM, mask=present, other=0.0)
    shares = student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum
    row_state = merged(shares, factor, residual, HAS_TEACHER)
    label_logit = tl.sum(tl.load(state + LABEL_LOGIT, mask=present, other=0.0), 0)
    row_statistics = statistics + row * STATISTICS
    tl.store(row_statistics + STUDENT_MAX, row_state[0])
    tl.store(row_statistics + STUDENT_SUM, row_state[1])
    tl.store(row_statistics + LABEL_LOGIT, label_logit - row_state[0])
    if HAS_TEACHER:
        tl.store(row_statistics + STUDENT_TAU_SUM, row_state[2])
        tl.store(row_statistics + TEACHER_MAX, row_state[3])
        tl.store(row_statistics + TEACHER_SUM, row_state[4])
        tl.store(row_statistics + KL_SUM, row_state[5])
