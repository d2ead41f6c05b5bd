# mypy: allow-untyped-defs
"""The Triton kernels on logits: the losses of a row in one pass, its gradient in another."""

from __future__ import annotations

import triton
import triton.language as tl

from dwt_kernels.triton_steps import (
    KL_SCALE,
    LN_2,
    LOG2_E,
    scan_row,
    write_gradient_block,
    write_zeros,
)


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
    """Program = row: its losses, and either its statistics or, IN_PLACE_GRADIENT, the gradient over the student's row.

    Args:
        student, teacher: (N, V) logits, any strides; teacher may be None.
        student_bias, teacher_bias: (V,) contiguous or None, added to the logits.
        labels: (N,) int64; temperature: 0-d fp32.
        hard, soft: (N,) fp32, written; statistics: (N, 5) fp32, written unless None (as in ``row_formulas``).
        upstream: (N,) fp32 (stride 0: one for all) and scales: (2,) fp64: what multiplies a row's losses.
        *_ALIGNMENT: a power of two, in elements, that divides the rows' offsets; lets loads be wide.
    """
    row_index = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row_index * label_stride)
    labelled = label != ignore_index
    student_pointer = student + tl.multiple_of(row_index * student_row_stride, STUDENT_ALIGNMENT)
    if not SOFT_ALL and not labelled:
        tl.store(hard + row_index, 0.0)
        tl.store(soft + row_index, 0.0)
        if IN_PLACE_GRADIENT:
            for start in range(0, V, BLOCK):
                write_zeros(student_pointer, student_column_stride, start, V, BLOCK)
        return
    # A label out of range is reported when the scales are prepared; here it must not read outside the row.
    label = tl.where(labelled & (label >= 0) & (label < V), label, 0)
    label_logit = tl.load(student_pointer + label * student_column_stride).to(tl.float32)
    if student_bias is not None:
        label_logit += tl.load(student_bias + label).to(tl.float32)
    if teacher is None:
        row = student_pointer, student_bias, student_column_stride, None, None, 1
    else:
        teacher_pointer = teacher + tl.multiple_of(row_index * teacher_row_stride, TEACHER_ALIGNMENT)
        row = student_pointer, student_bias, student_column_stride, teacher_pointer, teacher_bias, teacher_column_stride
    tau = tl.load(temperature)
    factor = LOG2_E / tau
    # At tau = 1 the student's two sums are one, which saves an exponential in three.
    if tau == 1.0:
        student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = scan_row(
            row, factor, V, BLOCK, True
        )
    else:
        student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = scan_row(
            row, factor, V, BLOCK, False
        )
    log2_sum = tl.log2(student_sum)
    student_log2_sum = log2_sum
    teacher_log2_sum = log2_sum
    kl = log2_sum * 0.0
    if teacher is not None:
        student_log2_sum = tl.log2(student_tau_sum)
        teacher_log2_sum = tl.log2(teacher_sum)
        # The log of the ratio, not the difference of the logs: each of those is rounded at ten times its size.
        kl = kl_sum / teacher_sum * (LN_2 / KL_SCALE) + tl.log(student_tau_sum / teacher_sum)
    tl.store(hard + row_index, tl.where(labelled, tl.log(student_sum) - (label_logit - student_max), 0.0))
    # KL >= 0: what rounding leaves below zero is an error of the sum and nothing else. NaN stays NaN.
    tl.store(soft + row_index, tl.where(kl < 0, 0.0, kl))
    if statistics is not None:
        row_statistics = statistics + row_index * 5
        tl.store(row_statistics, student_max)
        tl.store(row_statistics + 1, log2_sum)
        tl.store(row_statistics + 2, student_log2_sum)
        tl.store(row_statistics + 3, teacher_max)
        tl.store(row_statistics + 4, teacher_log2_sum)
    if IN_PLACE_GRADIENT:
        row_upstream = tl.load(upstream + row_index * upstream_stride)
        hard_scale = tl.where(labelled, row_upstream * tl.load(scales).to(tl.float32), 0.0)
        soft_scale = row_upstream * tl.load(scales + 1).to(tl.float32) / tau
        state = student_max, log2_sum, student_log2_sum, teacher_max, teacher_log2_sum
        # The row was read a moment ago: what is still in the L2 cache is not read from memory again.
        for start in range(0, V // BLOCK * BLOCK, BLOCK):
            write_gradient_block(
                student_pointer,
                student_column_stride,
                row,
                label,
                hard_scale,
                soft_scale,
                factor,
                state,
                start,
                V,
                BLOCK,
                False,
            )
        if V % BLOCK != 0:
            write_gradient_block(
                student_pointer,
                student_column_stride,
                row,
                label,
                hard_scale,
                soft_scale,
                factor,
                state,
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
    """Program = (row, block of columns): the gradient of upstream x (scales[0] hard + scales[1] soft) into ``out``.

    Arguments as in ``losses_kernel``; ``out`` (N, V) has unit column stride, ``statistics`` are those it wrote.
    """
    row_index = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    label = tl.load(labels + row_index * label_stride)
    labelled = label != ignore_index
    out_pointer = out + tl.multiple_of(row_index * out_row_stride, OUT_ALIGNMENT)
    if not SOFT_ALL and not labelled:
        write_zeros(out_pointer, 1, start, V, BLOCK)
        return
    student_pointer = student + tl.multiple_of(row_index * student_row_stride, STUDENT_ALIGNMENT)
    if teacher is None:
        row = student_pointer, None, student_column_stride, None, None, 1
    else:
        teacher_pointer = teacher + tl.multiple_of(row_index * teacher_row_stride, TEACHER_ALIGNMENT)
        row = student_pointer, None, student_column_stride, teacher_pointer, None, teacher_column_stride
    tau = tl.load(temperature)
    row_upstream = tl.load(upstream + row_index * upstream_stride)
    hard_scale = tl.where(labelled, row_upstream * tl.load(scales).to(tl.float32), 0.0)
    soft_scale = row_upstream * tl.load(scales + 1).to(tl.float32) / tau
    row_statistics = statistics + row_index * 5
    state = (
        tl.load(row_statistics),
        tl.load(row_statistics + 1),
        tl.load(row_statistics + 2),
        tl.load(row_statistics + 3),
        tl.load(row_statistics + 4),
    )
    write_gradient_block(
        out_pointer, 1, row, label, hard_scale, soft_scale, LOG2_E / tau, state, start, V, BLOCK, V % BLOCK != 0
    )
