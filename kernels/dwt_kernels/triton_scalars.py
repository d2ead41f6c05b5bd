# mypy: allow-untyped-defs, disable-error-code="attr-defined"
"""Two one-program kernels around the row kernels: arguments to scales, and rows to the reported losses.

They replace some twenty small torch operations, whose launches would take longer than the rows at small batches.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prepare_kernel(
    labels,
    temperature,
    hard_weight,
    soft_weight,
    hard_normalizer,
    soft_normalizer,
    scales,
    valid,
    rows,
    label_stride,
    ignore_index,
    vocab_size,
    BLOCK: tl.constexpr,
    MEAN: tl.constexpr,
    SOFT_ALL: tl.constexpr,
    TEMPERATURE_SQUARED: tl.constexpr,
):
    """scales (4,) fp64: [0:2] turn summed hard and soft rows into the reported losses, [2:4] also hold the weights.

    ``valid`` (int32) is 1 if every label, the temperature and the normalizers are in range, else 0.
    """
    labelled_rows = 0
    invalid_rows = 0
    # while, not range: the interpreter of Triton 3.6 cannot make a range of a kernel argument with numpy 2.4.
    start = 0
    while start < rows:
        index = start + tl.arange(0, BLOCK)
        label = tl.load(labels + index.to(tl.int64) * label_stride, mask=index < rows, other=ignore_index)
        labelled_rows += tl.sum((label != ignore_index).to(tl.int32), 0)
        outside = (label < 0) | (label >= vocab_size)
        invalid_rows += tl.sum(((label != ignore_index) & outside).to(tl.int32), 0)
        start += BLOCK
    tau = tl.load(temperature)
    infinity = float("inf")
    in_range = (invalid_rows == 0) & (tau > 0) & (tau < infinity)
    hard_scale = tl.full((), 1.0, tl.float64)
    soft_scale = hard_scale
    if MEAN:
        hard_divisor = labelled_rows.to(tl.float64)
        counted_rows = labelled_rows
        if SOFT_ALL:
            counted_rows = rows
        soft_divisor = counted_rows.to(tl.float64)
        if hard_normalizer is not None:
            hard_divisor = tl.load(hard_normalizer).to(tl.float64)
            in_range = in_range & (hard_divisor >= 0) & (hard_divisor < infinity)
        if soft_normalizer is not None:
            soft_divisor = tl.load(soft_normalizer).to(tl.float64)
            in_range = in_range & (soft_divisor >= 0) & (soft_divisor < infinity)
        # An empty mean is 0 and not NaN.
        hard_scale = tl.where(labelled_rows == 0, 0.0, 1.0 / hard_divisor)
        soft_scale = tl.where(counted_rows == 0, 0.0, 1.0 / soft_divisor)
    if TEMPERATURE_SQUARED:
        soft_scale = soft_scale * tau.to(tl.float64) * tau.to(tl.float64)
    tl.store(scales, hard_scale)
    tl.store(scales + 1, soft_scale)
    tl.store(scales + 2, hard_scale * tl.load(hard_weight))
    tl.store(scales + 3, soft_scale * tl.load(soft_weight))
    tl.store(valid, in_range.to(tl.int32))


@triton.jit
def reduce_kernel(hard_rows, soft_rows, scales, loss, hard, soft, rows, BLOCK: tl.constexpr):
    """loss, hard and soft (0-d fp32) from rows (N,) fp32, summed in fp64 and in a fixed order."""
    hard_sums = tl.zeros((BLOCK,), tl.float64)
    soft_sums = tl.zeros((BLOCK,), tl.float64)
    start = 0
    while start < rows:
        index = start + tl.arange(0, BLOCK)
        hard_sums += tl.load(hard_rows + index, mask=index < rows, other=0.0)
        soft_sums += tl.load(soft_rows + index, mask=index < rows, other=0.0)
        start += BLOCK
    hard_sum = tl.sum(hard_sums, 0)
    soft_sum = tl.sum(soft_sums, 0)
    tl.store(loss, hard_sum * tl.load(scales + 2) + soft_sum * tl.load(scales + 3))
    tl.store(hard, hard_sum * tl.load(scales))
    tl.store(soft, soft_sum * tl.load(scales + 1))
