# mypy: allow-untyped-defs
"""The steps the row kernels are made of: a block of columns into the running sums, a block of the gradient.

Legend: V vocabulary columns, z logits, m maxima, f = log2(e) / tau. As in ``row_formulas``, everything is fp32 and in
powers of 2.

Forward recurrence. With running maxima m and, for the block at hand, a = z_s - m_s and b = z_t - m_t:

    S_1 <- S_1 2^((m_s_old - m_s) log2(e)) + sum 2^(a log2(e))
    S   <- S   2^((m_s_old - m_s) f)       + sum 2^(a f)
    W   <- W   2^((m_t_old - m_t) f)       + sum 2^(b f)
    K   <- (K + W_old shift) 2^((m_t_old - m_t) f) + sum 2^(b f) (b - a)

where ``shift`` is by how much b - a of the columns seen so far changes with the new maxima. The losses follow from the
sums in ``losses_kernel`` of ``triton_scalars``.

Gradient: hard_scale (p_s - onehot) + soft_scale (p_s^tau - p_t^tau), from the logits and the row's sums.

A ``row`` is the tuple (student pointer, student bias, student column stride, teacher pointer, teacher bias, teacher
column stride); biases (V,) and the teacher may be None.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MINUS_INF = tl.constexpr(float("-inf"))

# TRITON_INTERPRET=1 was set when Triton was imported: kernels run in Python, on any device, for tests.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# K can reach V times the largest KL; scaled down by a power of 2 no vocabulary overflows fp32.
KL_SCALE = tl.constexpr(2.0**-20)


@triton.jit
def load_logits(pointer, bias, column_stride, start, V: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """fp32 logits of a block, bias included; -inf past the last column."""
    columns = start + tl.arange(0, BLOCK)
    pointers = pointer + columns.to(tl.int64) * column_stride
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
def power(x, factor, residual, UNIT_TEMPERATURE: tl.constexpr):
    """2^(x f), f being factor + residual; see ``scalars.Scalars``."""
    return tl.exp2(x * factor) if UNIT_TEMPERATURE else tl.exp2(x * factor + x * residual)


@triton.jit
def add_block(
    state,
    row,
    factor,
    residual,
    start,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr,
):
    """One step of the recurrence; ``state`` is (m_s, S_1, S, m_t, W, K).

    A reduction over the block costs barriers, so the two maxima are taken in one and the sums in another.
    """
    student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = state
    student_pointer, student_bias, student_stride, teacher_pointer, teacher_bias, teacher_stride = row
    student = load_logits(student_pointer, student_bias, student_stride, start, V, BLOCK, MASKED)
    # Not an early return: the compiler would go on to what follows it, and load from a teacher that is None.
    if teacher_pointer is None:
        new_student_max = tl.maximum(student_max, tl.max(student, 0))
        student_reference = finite_or_zero(new_student_max)
        exponentials = tl.exp2((student - student_reference) * LOG2_E)
        rescale = tl.exp2((student_max - student_reference) * LOG2_E)
        student_sum = student_sum * rescale + tl.sum(exponentials, 0)
        return new_student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum
    else:
        teacher = load_logits(teacher_pointer, teacher_bias, teacher_stride, start, V, BLOCK, MASKED)
        block_student_max, block_teacher_max = tl.split(tl.max(tl.join(student, teacher), 0))
        new_student_max = tl.maximum(student_max, block_student_max)
        new_teacher_max = tl.maximum(teacher_max, block_teacher_max)
        student_reference, teacher_reference = finite_or_zero(new_student_max), finite_or_zero(new_teacher_max)
        student -= student_reference
        teacher -= teacher_reference
        weights = power(teacher, factor, residual, UNIT_TEMPERATURE)
        # A teacher logit of -inf has weight 0 and no share, where 0 x inf would be NaN.
        shares = tl.where(weights > 0, weights * ((teacher - student) * KL_SCALE), 0.0)
        exponentials = tl.exp2(student * LOG2_E)
        tau_exponentials = exponentials if UNIT_TEMPERATURE else power(student, factor, residual, False)
        if INTERPRETED:
            # numpy adds the terms of a joined tensor one after the other, not in pairs, and loses a digit.
            block_student_sum, block_student_tau_sum = tl.sum(exponentials, 0), tl.sum(tau_exponentials, 0)
            block_teacher_sum, block_kl_sum = tl.sum(weights, 0), tl.sum(shares, 0)
        else:
            sums = tl.sum(tl.join(tl.join(exponentials, tau_exponentials), tl.join(weights, shares)), 0)
            student_sums, teacher_sums = tl.split(sums)
            block_student_sum, block_student_tau_sum = tl.split(student_sums)
            block_teacher_sum, block_kl_sum = tl.split(teacher_sums)
        student_shift, teacher_shift = student_max - student_reference, teacher_max - teacher_reference
        student_sum = student_sum * tl.exp2(student_shift * LOG2_E) + block_student_sum
        student_tau_sum = (
            student_tau_sum * power(student_shift, factor, residual, UNIT_TEMPERATURE) + block_student_tau_sum
        )
        rescale = power(teacher_shift, factor, residual, UNIT_TEMPERATURE)
        shift = finite_or_zero(teacher_shift) - finite_or_zero(student_shift)
        kl_sum = rescale * (kl_sum + teacher_sum * (shift * KL_SCALE)) + block_kl_sum
        teacher_sum = teacher_sum * rescale + block_teacher_sum
        return new_student_max, student_sum, student_tau_sum, new_teacher_max, teacher_sum, kl_sum


@triton.jit
def scan_row(row, factor, residual, V: tl.constexpr, BLOCK: tl.constexpr, UNIT_TEMPERATURE: tl.constexpr):
    """The recurrence over a row. The last, partial block is a step of its own, so that the others need no mask."""
    zero = factor * 0.0
    state = zero + MINUS_INF, zero, zero, zero + MINUS_INF, zero, zero
    for start in range(0, V // BLOCK * BLOCK, BLOCK):
        state = add_block(state, row, factor, residual, start, V, BLOCK, False, UNIT_TEMPERATURE)
    if V % BLOCK != 0:
        state = add_block(state, row, factor, residual, V // BLOCK * BLOCK, V, BLOCK, True, UNIT_TEMPERATURE)
    return state


@triton.jit
def write_gradient_block(
    out,
    out_column_stride,
    row,
    label,
    hard_scale,
    soft_scale,
    factor,
    residual,
    sums,
    start,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The gradient of a block of columns into the row ``out``, which may be the student's."""
    student_max, student_sum, student_tau_sum, teacher_max, teacher_sum = sums
    student_pointer, student_bias, student_stride, teacher_pointer, teacher_bias, teacher_stride = row
    student = load_logits(student_pointer, student_bias, student_stride, start, V, BLOCK, MASKED) - student_max
    # The soft difference is small or exact, onehot the largest term: this order of additions loses least.
    gradient = tl.zeros((BLOCK,), tl.float32)
    if teacher_pointer is not None:
        teacher = load_logits(teacher_pointer, teacher_bias, teacher_stride, start, V, BLOCK, MASKED) - teacher_max
        gradient = tl.div_rn(soft_scale, student_tau_sum) * power(student, factor, residual, False)
        gradient -= tl.div_rn(soft_scale, teacher_sum) * power(teacher, factor, residual, False)
    gradient += tl.div_rn(hard_scale, student_sum) * tl.exp2(student * LOG2_E)
    columns = start + tl.arange(0, BLOCK)
    gradient -= tl.where(columns == label, hard_scale, 0.0)
    pointers = out + columns.to(tl.int64) * out_column_stride
    if MASKED:
        tl.store(pointers, gradient.to(out.dtype.element_ty), mask=columns < V)
    else:
        tl.store(pointers, gradient.to(out.dtype.element_ty))


@triton.jit
def write_zeros(out, out_column_stride, start, V: tl.constexpr, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32).to(out.dtype.element_ty)
    tl.store(out + columns.to(tl.int64) * out_column_stride, zeros, mask=columns < V)
