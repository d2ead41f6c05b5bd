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
    state,
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
    """One step of the recurrence; ``factor`` is log2(e) / tau."""
    student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = state
    student = load_logits(student_row, student_bias, student_column_stride, start, V, BLOCK, MASKED)
    new_student_max = tl.maximum(student_max, tl.max(student, 0))
    student_reference = finite_or_zero(new_student_max)
    student -= student_reference
    student_shift = student_max - student_reference
    student_sum = student_sum * tl.exp2(student_shift * LOG2_E) + tl.sum(tl.exp2(student * LOG2_E), 0)
    if teacher_row is not None:
        student *= factor
        if UNIT_TEMPERATURE:
            student_tau_sum = student_sum
        else:
            student_tau_sum = student_tau_sum * tl.exp2(student_shift * factor) + tl.sum(tl.exp2(student), 0)
        teacher = load_logits(teacher_row, teacher_bias, teacher_column_stride, start, V, BLOCK, MASKED)
        new_teacher_max = tl.maximum(teacher_max, tl.max(teacher, 0))
        teacher_reference = finite_or_zero(new_teacher_max)
        teacher = (teacher - teacher_reference) * factor
        weights = tl.exp2(teacher)
        # A teacher logit of -inf has weight 0 and no share, where 0 x inf would be NaN.
        shares = tl.where(weights > 0, weights * ((teacher - student) * KL_SCALE), 0.0)
        teacher_shift = teacher_max - teacher_reference
        shift = finite_or_zero(teacher_shift) - finite_or_zero(student_shift)
        rescale = tl.exp2(teacher_shift * factor)
        kl_sum = rescale * (kl_sum + teacher_sum * (shift * factor * KL_SCALE)) + tl.sum(shares, 0)
        teacher_sum = teacher_sum * rescale + tl.sum(weights, 0)
        teacher_max = new_teacher_max
    return new_student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum


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
    state = (MINUS_INF + 0.0 * factor, 0.0 * factor, 0.0 * factor, MINUS_INF + 0.0 * factor, 0.0 * factor, 0.0 * factor)
    for start in range(0, V // BLOCK * BLOCK, BLOCK):
        state = add_block(
            state,
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
        state = add_block(
            state,
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
    return state
