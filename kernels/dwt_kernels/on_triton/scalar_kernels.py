# mypy: allow-untyped-defs, disable-error-code="attr-defined"
"""The small kernels around the rows: arguments to ``Scalars``, statistics to losses and ``RowTerms``, losses to means.

``on_torch.scalars`` does the same with some thirty torch operations, whose launches would take longer than the rows at
small batches. In fp64, as there. One more kernel scales a gradient of any size when the upstream gradient is known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwt_kernels.on_triton.constants import (
    FACTOR,
    HARD_GRADIENT,
    HARD_LOSS,
    HARD_MEAN,
    HARD_TERM,
    KL_SCALE,
    KL_SUM,
    LABEL_LOGIT,
    LABEL_TERM,
    LEAST_RESIDUAL,
    LN_2,
    LOG2_E,
    NO_RESIDUAL,
    RESIDUAL,
    SOFT_GRADIENT,
    SOFT_LOSS,
    SOFT_MEAN,
    STATISTICS,
    STUDENT_MAX,
    STUDENT_MAX_TERM,
    STUDENT_SOFT_TERM,
    STUDENT_SUM,
    STUDENT_TAU_SUM,
    TEACHER_MAX,
    TEACHER_MAX_TERM,
    TEACHER_SOFT_TERM,
    TEACHER_SUM,
    TERMS,
)

# These change from call to call. Triton would otherwise recompile when they become 1 or divisible by 16.
ROW_COUNTS = ("rows", "elements")


@triton.jit
def round_down(x):
    """The largest fp32 not above x > 0, in fp64."""
    nearest = x.to(tl.float32)
    below = (nearest.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    return tl.where(nearest.to(tl.float64) <= x, nearest, below).to(tl.float64)


@triton.jit(do_not_specialize=ROW_COUNTS)
def prepare_kernel(
    labels,
    temperature,
    hard_weight,
    soft_weight,
    hard_normalizer,
    soft_normalizer,
    scalars,
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
    """One program: the scalars (8,) fp64, see ``layout.Scalars``.

    ``valid`` (int32) is 1 if every label, the temperature and the normalizers are in range, else 0.
    """
    # Summed over the block once, after the loop: a reduction in it would be a barrier in every step.
    labelled_counts = tl.zeros((BLOCK,), tl.int32)
    invalid_counts = tl.zeros((BLOCK,), tl.int32)
    # while, not range: the interpreter of Triton 3.6 cannot make a range of a kernel argument with numpy 2.4.
    start = 0
    while start < rows:
        index = start + tl.arange(0, BLOCK)
        label = tl.load(labels + index.to(tl.int64) * label_stride, mask=index < rows, other=ignore_index)
        labelled_counts += (label != ignore_index).to(tl.int32)
        outside = (label < 0) | (label >= vocab_size)
        invalid_counts += ((label != ignore_index) & outside).to(tl.int32)
        start += BLOCK
    labelled_rows = tl.sum(labelled_counts, 0)
    invalid_rows = tl.sum(invalid_counts, 0)
    tau = tl.load(temperature).to(tl.float64)
    infinity = float("inf")
    in_range = (invalid_rows == 0) & (tau > 0) & (tau < infinity)
    hard_mean = tl.full((), 1.0, tl.float64)
    soft_mean = hard_mean
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
        hard_mean = tl.where(labelled_rows == 0, 0.0, 1.0 / hard_divisor)
        soft_mean = tl.where(counted_rows == 0, 0.0, 1.0 / soft_divisor)
    if TEMPERATURE_SQUARED:
        soft_mean = soft_mean * tau * tau
    hard_loss = hard_mean * tl.load(hard_weight).to(tl.float64)
    soft_loss = soft_mean * tl.load(soft_weight).to(tl.float64)
    exponent = tl.full((), LOG2_E, tl.float64) / tau
    factor = round_down(exponent)
    residual = exponent - factor
    residual = tl.where(residual < exponent * LEAST_RESIDUAL, NO_RESIDUAL, residual)
    tl.store(scalars + HARD_MEAN, hard_mean)
    tl.store(scalars + SOFT_MEAN, soft_mean)
    tl.store(scalars + HARD_LOSS, hard_loss)
    tl.store(scalars + SOFT_LOSS, soft_loss)
    tl.store(scalars + HARD_GRADIENT, hard_loss)
    tl.store(scalars + SOFT_GRADIENT, soft_loss / tau)
    tl.store(scalars + FACTOR, factor)
    tl.store(scalars + RESIDUAL, residual)
    tl.store(valid, in_range.to(tl.int32))


@triton.jit(do_not_specialize=ROW_COUNTS)
def losses_kernel(
    statistics,
    scalars,
    labels,
    hard,
    soft,
    rows,
    label_stride,
    ignore_index,
    BLOCK: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SOFT_ALL: tl.constexpr,
):
    """Program = BLOCK rows: hard = ln S_1 - a[y] and soft = ln 2 (K f / W + log2(S / W)), 0 on rows that do not count.

    In fp64: the soft loss is the sum of two terms that are often larger than it.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = index < rows
    labelled = tl.load(labels + index.to(tl.int64) * label_stride, mask=in_range, other=ignore_index) != ignore_index
    counted = in_range if SOFT_ALL else labelled
    row = statistics + index.to(tl.int64) * STATISTICS
    student_sum = tl.load(row + STUDENT_SUM, mask=counted, other=1.0).to(tl.float64)
    label_logit = tl.load(row + LABEL_LOGIT, mask=counted, other=0.0).to(tl.float64)
    tl.store(hard + index, tl.where(labelled, tl.log(student_sum) - label_logit, 0.0).to(tl.float32), mask=in_range)
    soft_loss = tl.zeros((BLOCK,), tl.float64)
    if HAS_TEACHER:
        student_tau_sum = tl.load(row + STUDENT_TAU_SUM, mask=counted, other=1.0).to(tl.float64)
        teacher_sum = tl.load(row + TEACHER_SUM, mask=counted, other=1.0).to(tl.float64)
        kl_sum = tl.load(row + KL_SUM, mask=counted, other=0.0).to(tl.float64)
        exponent = (tl.load(scalars + FACTOR) + tl.load(scalars + RESIDUAL)) * (1 / KL_SCALE)
        kl = kl_sum / teacher_sum * exponent + tl.log2(student_tau_sum / teacher_sum)
        # KL >= 0: what rounding leaves below zero is an error of the sums and nothing else. NaN stays NaN.
        soft_loss = tl.where(counted & ~(kl < 0), kl * tl.full((), LN_2, tl.float64), 0.0)
    tl.store(soft + index, soft_loss.to(tl.float32), mask=in_range)


@triton.jit(do_not_specialize=ROW_COUNTS)
def terms_kernel(
    statistics,
    scalars,
    labels,
    upstream,
    terms,
    rows,
    label_stride,
    upstream_stride,
    ignore_index,
    BLOCK: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SOFT_ALL: tl.constexpr,
):
    """Program = BLOCK rows: ``layout.RowTerms`` (N, 6); anything finite on rows that do not count.

    A row's quotients are made once, and not in each of its blocks. In fp64: an error would be the same in every column.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = index < rows
    labelled = tl.load(labels + index.to(tl.int64) * label_stride, mask=in_range, other=ignore_index) != ignore_index
    counted = in_range if SOFT_ALL else labelled
    row = statistics + index.to(tl.int64) * STATISTICS
    out = terms + index.to(tl.int64) * TERMS
    row_upstream = tl.load(upstream + index.to(tl.int64) * upstream_stride, mask=in_range, other=0.0).to(tl.float64)
    hard_scale = tl.where(labelled, row_upstream * tl.load(scalars + HARD_GRADIENT), 0.0)
    student_sum = tl.load(row + STUDENT_SUM, mask=counted, other=1.0).to(tl.float64)
    tl.store(out + STUDENT_MAX_TERM, tl.load(row + STUDENT_MAX, mask=counted, other=0.0), mask=in_range)
    tl.store(out + HARD_TERM, (hard_scale / student_sum).to(tl.float32), mask=in_range)
    tl.store(out + LABEL_TERM, hard_scale.to(tl.float32), mask=in_range)
    if HAS_TEACHER:
        soft_scale = row_upstream * tl.load(scalars + SOFT_GRADIENT)
        student_tau_sum = tl.load(row + STUDENT_TAU_SUM, mask=counted, other=1.0).to(tl.float64)
        teacher_sum = tl.load(row + TEACHER_SUM, mask=counted, other=1.0).to(tl.float64)
        tl.store(out + TEACHER_MAX_TERM, tl.load(row + TEACHER_MAX, mask=counted, other=0.0), mask=in_range)
        tl.store(out + STUDENT_SOFT_TERM, (soft_scale / student_tau_sum).to(tl.float32), mask=in_range)
        tl.store(out + TEACHER_SOFT_TERM, (soft_scale / teacher_sum).to(tl.float32), mask=in_range)


@triton.jit(do_not_specialize=ROW_COUNTS)
def scale_kernel(out, tensor, factor, elements, BLOCK: tl.constexpr):
    """Program = BLOCK elements: out = tensor x factor (0-d fp32), multiplied in fp32 and rounded once.

    ``elements`` may end within a load of several: only the last program masks.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    if start + BLOCK <= elements:
        product = tl.load(tensor + index).to(tl.float32) * tl.load(factor)
        tl.store(out + index, product.to(out.dtype.element_ty))
    else:
        product = tl.load(tensor + index, mask=index < elements).to(tl.float32) * tl.load(factor)
        tl.store(out + index, product.to(out.dtype.element_ty), mask=index < elements)


@triton.jit(do_not_specialize=ROW_COUNTS)
def reduce_kernel(hard_rows, soft_rows, scalars, loss, hard, soft, rows, BLOCK: tl.constexpr):
    """One program: loss, hard and soft (0-d fp32) from rows (N,) fp32, summed in a fixed order."""
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
    total = hard_sum * tl.load(scalars + HARD_LOSS) + soft_sum * tl.load(scalars + SOFT_LOSS)
    tl.store(loss, total.to(tl.float32))
    tl.store(hard, (hard_sum * tl.load(scalars + HARD_MEAN)).to(tl.float32))
    tl.store(soft, (soft_sum * tl.load(scalars + SOFT_MEAN)).to(tl.float32))
