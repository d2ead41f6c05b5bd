"""The Triton kernels on logits: losses in one pass over a row, its gradient in another.

Legend: V vocabulary columns, z logits, m maxima. As in ``row_formulas``, everything is fp32 and in powers of 2, and a
row's statistics are m_s, log2 sum exp(z_s - m_s), log2 sum exp((z_s - m_s) / tau), m_t, log2 sum exp((z_t - m_t) / tau).

Forward recurrence. With running maxima m and, for the block at hand, a = z_s - m_s, u_s = a log2(e) / tau,
u_t = (z_t - m_t) log2(e) / tau:

    S_1 <- S_1 2^((m_old - m_s) log2 e)    + sum 2^(a log2 e)
    S   <- S   2^((m_old - m_s) log2 e/tau) + sum 2^u_s
    W   <- W   2^((m_t_old - m_t) log2 e/tau) + sum 2^u_t
    K   <- 2^((m_t_old - m_t) log2 e/tau) (K + W_old shift) + sum 2^u_t (u_t - u_s)

where ``shift`` is by how much u_t - u_s of the columns seen so far changes with the new maxima. Then, in nats,
hard = ln S_1 - (z_s[y] - m_s) and soft = ln 2 (K / W) + ln S - ln W.

Gradient: hard_scale (p_s - onehot) + soft_scale / tau (p_s^tau - p_t^tau), recomputed from the logits and statistics.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# K can reach V times the largest KL; scaled down by a power of 2 no vocabulary overflows fp32.
KL_SCALE = tl.constexpr(2.0**-20)
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def load_logits(row, bias, column_stride, start, V: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """fp32 logits of a block, bias included; -inf past the last column."""
    columns = start + tl.arange(0, BLOCK)
    pointers = row + columns.to(tl.int64) * column_stride
    if MASKED:
        logits = tl.load(pointers, mask=columns < V, other=MINUS_INF).to(tl.float32)
    else:
        logits = tl.load(pointers).to(tl.float32)
    if bias is not None:
        if MASKED:
            logits += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
        else:
            logits += tl.load(bias + columns).to(tl.float32)
    return logits


@triton.jit
def finite_or_zero(maximum):
    """A reference to subtract: where every logit so far is -inf, 0 keeps -inf - reference from being NaN."""
    return tl.where(maximum == MINUS_INF, 0.0, maximum)


@triton.jit
def add_block(
    student_max,
    student_sum,
    student_tau_sum,
    teacher_max,
    teacher_sum,
    kl_sum,
    student_row,
    student_bias,
    student_column_stride,
    teacher_row,
    teacher_bias,
    teacher_column_stride,
    factor,
    start,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr,
):
    """One step of the recurrence; ``factor`` is log2(e) / tau.

    A reduction over the block costs barriers, so the two maxima are taken in one and the sums in another.
    """
    student = load_logits(student_row, student_bias, student_column_stride, start, V, BLOCK, MASKED)
    if teacher_row is None:
        new_student_max = tl.maximum(student_max, tl.max(student, 0))
        student_reference = finite_or_zero(new_student_max)
        exponentials = tl.exp2((student - student_reference) * LOG2_E)
        rescale = tl.exp2((student_max - student_reference) * LOG2_E)
        student_sum = student_sum * rescale + tl.sum(exponentials, 0)
        return new_student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum
    teacher = load_logits(teacher_row, teacher_bias, teacher_column_stride, start, V, BLOCK, MASKED)
    block_student_max, block_teacher_max = tl.split(tl.max(tl.join(student, teacher), 0))
    new_student_max = tl.maximum(student_max, block_student_max)
    new_teacher_max = tl.maximum(teacher_max, block_teacher_max)
    student_reference, teacher_reference = finite_or_zero(new_student_max), finite_or_zero(new_teacher_max)
    student -= student_reference
    teacher -= teacher_reference
    weights = tl.exp2(teacher * factor)
    # A teacher logit of -inf has weight 0 and no share, where 0 x inf would be NaN.
    shares = tl.where(weights > 0, weights * ((teacher - student) * (factor * KL_SCALE)), 0.0)
    exponentials = tl.exp2(student * LOG2_E)
    if UNIT_TEMPERATURE:
        tau_exponentials = exponentials
    else:
        tau_exponentials = tl.exp2(student * factor)
    sums = tl.sum(tl.join(tl.join(exponentials, tau_exponentials), tl.join(weights, shares)), 0)
    student_sums, teacher_sums = tl.split(sums)
    block_student_sum, block_student_tau_sum = tl.split(student_sums)
    block_teacher_sum, block_kl_sum = tl.split(teacher_sums)
    student_shift, teacher_shift = student_max - student_reference, teacher_max - teacher_reference
    student_sum = student_sum * tl.exp2(student_shift * LOG2_E) + block_student_sum
    student_tau_sum = student_tau_sum * tl.exp2(student_shift * factor) + block_student_tau_sum
    rescale = tl.exp2(teacher_shift * factor)
    shift = finite_or_zero(teacher_shift) - finite_or_zero(student_shift)
    kl_sum = rescale * (kl_sum + teacher_sum * (shift * (factor * KL_SCALE))) + block_kl_sum
    teacher_sum = teacher_sum * rescale + block_teacher_sum
    return new_student_max, student_sum, student_tau_sum, new_teacher_max, teacher_sum, kl_sum


@triton.jit
def scan_row(
    student_row,
    student_bias,
    student_column_stride,
    teacher_row,
    teacher_bias,
    teacher_column_stride,
    factor,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr,
):
    """The recurrence over a row. The last, partial block is a step of its own, so that the others need no mask."""
    zero = factor * 0.0
    student_max, student_sum, student_tau_sum = zero + MINUS_INF, zero, zero
    teacher_max, teacher_sum, kl_sum = zero + MINUS_INF, zero, zero
    for start in range(0, V // BLOCK * BLOCK, BLOCK):
        student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = add_block(
            student_max,
            student_sum,
            student_tau_sum,
            teacher_max,
            teacher_sum,
            kl_sum,
            student_row,
            student_bias,
            student_column_stride,
            teacher_row,
            teacher_bias,
            teacher_column_stride,
            factor,
            start,
            V,
            BLOCK,
            False,
            UNIT_TEMPERATURE,
        )
    if V % BLOCK != 0:
        student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = add_block(
            student_max,
            student_sum,
            student_tau_sum,
            teacher_max,
            teacher_sum,
            kl_sum,
            student_row,
            student_bias,
            student_column_stride,
            teacher_row,
            teacher_bias,
            teacher_column_stride,
            factor,
            V // BLOCK * BLOCK,
            V,
            BLOCK,
            True,
            UNIT_TEMPERATURE,
        )
    return student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum


@triton.jit
def write_gradient_block(
    out_row,
    out_column_stride,
    student_row,
    student_bias,
    student_column_stride,
    teacher_row,
    teacher_bias,
    teacher_column_stride,
    label,
    hard_scale,
    soft_scale,
    factor,
    student_max,
    log2_sum,
    student_log2_sum,
    teacher_max,
    teacher_log2_sum,
    start,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """hard_scale (p_s - onehot) + soft_scale (p_s^tau - p_t^tau) of a block; ``out_row`` may be ``student_row``."""
    student = load_logits(student_row, student_bias, student_column_stride, start, V, BLOCK, MASKED) - student_max
    gradient = hard_scale * tl.exp2(student * LOG2_E - log2_sum)
    columns = start + tl.arange(0, BLOCK)
    gradient -= tl.where(columns == label, hard_scale, 0.0)
    if teacher_row is not None:
        teacher = load_logits(teacher_row, teacher_bias, teacher_column_stride, start, V, BLOCK, MASKED) - teacher_max
        gradient += soft_scale * (
            tl.exp2(student * factor - student_log2_sum) - tl.exp2(teacher * factor - teacher_log2_sum)
        )
    pointers = out_row + columns.to(tl.int64) * out_column_stride
    if MASKED:
        tl.store(pointers, gradient.to(out_row.dtype.element_ty), mask=columns < V)
    else:
        tl.store(pointers, gradient.to(out_row.dtype.element_ty))


@triton.jit
def losses_kernel(
    student,
    student_bias,
    teacher,
    teacher_bias,
    labels,
    temperature,
    hard,
    soft,
    statistics,
    upstream,
    scales,
    student_row_stride,
    student_column_stride,
    teacher_row_stride,
    teacher_column_stride,
    label_stride,
    upstream_stride,
    ignore_index,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    STUDENT_ALIGNMENT: tl.constexpr,
    TEACHER_ALIGNMENT: tl.constexpr,
    SOFT_ALL: tl.constexpr,
    IN_PLACE_GRADIENT: tl.constexpr,
):
    """Program = row: hard and soft loss, and either the statistics or, ``IN_PLACE_GRADIENT``, the gradient over student.

    Args:
        student, teacher: (N, V) logits, any strides; teacher may be None.
        student_bias, teacher_bias: (V,) contiguous or None, added to the logits.
        labels: (N,) int64; temperature: 0-d fp32.
        hard, soft: (N,) fp32, written; statistics: (N, 5) fp32, written if not None.
        upstream: (N,) fp32 (stride 0: one for all) and scales: (2,) fp32: what multiplies a row's losses.
        *_ALIGNMENT: a power of two, in elements, that divides the rows' offsets; lets loads be wide.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row * label_stride)
    labelled = label != ignore_index
    student_row = student + tl.multiple_of(row * student_row_stride, STUDENT_ALIGNMENT)
    if not SOFT_ALL:
        if not labelled:
            tl.store(hard + row, 0.0)
            tl.store(soft + row, 0.0)
            if IN_PLACE_GRADIENT:
                for start in range(0, V, BLOCK):
                    columns = start + tl.arange(0, BLOCK)
                    pointers = student_row + columns.to(tl.int64) * student_column_stride
                    zeros = tl.zeros((BLOCK,), tl.float32).to(student_row.dtype.element_ty)
                    tl.store(pointers, zeros, mask=columns < V)
            return
    # An out-of-range label is reported by the prologue; here it must not read outside the row.
    label = tl.where(labelled & (label >= 0) & (label < V), label, 0)
    label_logit = tl.load(student_row + label * student_column_stride).to(tl.float32)
    if student_bias is not None:
        label_logit += tl.load(student_bias + label).to(tl.float32)
    tau = tl.load(temperature)
    factor = LOG2_E / tau
    if teacher is not None:
        teacher_row = teacher + tl.multiple_of(row * teacher_row_stride, TEACHER_ALIGNMENT)
    else:
        teacher_row = None
    # At tau = 1 the student's two sums are one, which saves an exponential in three.
    if tau == 1.0:
        student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = scan_row(
            student_row,
            student_bias,
            student_column_stride,
            teacher_row,
            teacher_bias,
            teacher_column_stride,
            factor,
            V,
            BLOCK,
            True,
        )
    else:
        student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = scan_row(
            student_row,
            student_bias,
            student_column_stride,
            teacher_row,
            teacher_bias,
            teacher_column_stride,
            factor,
            V,
            BLOCK,
            False,
        )
    log2_sum = tl.log2(student_sum)
    tl.store(hard + row, tl.where(labelled, log2_sum * LN_2 - (label_logit - student_max), 0.0))
    student_log2_sum = log2_sum
    teacher_log2_sum = log2_sum
    if teacher is not None:
        student_log2_sum = tl.log2(student_tau_sum)
        teacher_log2_sum = tl.log2(teacher_sum)
        kl = (kl_sum / teacher_sum * (1 / KL_SCALE) + student_log2_sum - teacher_log2_sum) * LN_2
        # KL >= 0: what rounding leaves below zero is an error of the sum and nothing else. NaN stays NaN.
        tl.store(soft + row, tl.where(kl < 0, 0.0, kl))
    else:
        tl.store(soft + row, 0.0)
    if statistics is not None:
        row_statistics = statistics + row * 5
        tl.store(row_statistics, student_max)
        tl.store(row_statistics + 1, log2_sum)
        tl.store(row_statistics + 2, student_log2_sum)
        tl.store(row_statistics + 3, teacher_max)
        tl.store(row_statistics + 4, teacher_log2_sum)
    if IN_PLACE_GRADIENT:
        row_upstream = tl.load(upstream + row * upstream_stride)
        hard_scale = tl.where(labelled, row_upstream * tl.load(scales), 0.0)
        soft_scale = row_upstream * tl.load(scales + 1) / tau
        # The row was read a moment ago: what is still in the L2 cache is not read from memory again.
        for start in range(0, V // BLOCK * BLOCK, BLOCK):
            write_gradient_block(
                student_row,
                student_column_stride,
                student_row,
                student_bias,
                student_column_stride,
                teacher_row,
                teacher_bias,
                teacher_column_stride,
                label,
                hard_scale,
                soft_scale,
                factor,
                student_max,
                log2_sum,
                student_log2_sum,
                teacher_max,
                teacher_log2_sum,
                start,
                V,
                BLOCK,
                False,
            )
        if V % BLOCK != 0:
            write_gradient_block(
                student_row,
                student_column_stride,
                student_row,
                student_bias,
                student_column_stride,
                teacher_row,
                teacher_bias,
                teacher_column_stride,
                label,
                hard_scale,
                soft_scale,
                factor,
                student_max,
                log2_sum,
                student_log2_sum,
                teacher_max,
                teacher_log2_sum,
                V // BLOCK * BLOCK,
                V,
                BLOCK,
                True,
            )


@triton.jit
def gradient_kernel(
    out,
    student,
    teacher,
    labels,
    temperature,
    statistics,
    upstream,
    scales,
    out_row_stride,
    student_row_stride,
    student_column_stride,
    teacher_row_stride,
    teacher_column_stride,
    label_stride,
    upstream_stride,
    ignore_index,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    OUT_ALIGNMENT: tl.constexpr,
    STUDENT_ALIGNMENT: tl.constexpr,
    TEACHER_ALIGNMENT: tl.constexpr,
    SOFT_ALL: tl.constexpr,
):
    """Program = (row, block of columns): the gradient (N, V) of upstream x (scales[0] hard + scales[1] soft) into ``out``.

    Arguments as in ``losses_kernel``; ``out`` has unit column stride, ``statistics`` are those it wrote.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    label = tl.load(labels + row * label_stride)
    labelled = label != ignore_index
    out_row = out + tl.multiple_of(row * out_row_stride, OUT_ALIGNMENT)
    if not SOFT_ALL:
        if not labelled:
            columns = start + tl.arange(0, BLOCK)
            tl.store(out_row + columns, tl.zeros((BLOCK,), tl.float32).to(out.dtype.element_ty), mask=columns < V)
            return
    tau = tl.load(temperature)
    row_upstream = tl.load(upstream + row * upstream_stride)
    row_statistics = statistics + row * 5
    if teacher is not None:
        teacher_row = teacher + tl.multiple_of(row * teacher_row_stride, TEACHER_ALIGNMENT)
    else:
        teacher_row = None
    write_gradient_block(
        out_row,
        1,
        student + tl.multiple_of(row * student_row_stride, STUDENT_ALIGNMENT),
        None,
        student_column_stride,
        teacher_row,
        None,
        teacher_column_stride,
        label,
        tl.where(labelled, row_upstream * tl.load(scales), 0.0),
        row_upstream * tl.load(scales + 1) / tau,
        LOG2_E / tau,
        tl.load(row_statistics),
        tl.load(row_statistics + 1),
        tl.load(row_statistics + 2),
        tl.load(row_statistics + 3),
        tl.load(row_statistics + 4),
        start,
        V,
        BLOCK,
        V % BLOCK != 0,
    )
