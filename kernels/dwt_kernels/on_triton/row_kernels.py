# mypy: allow-untyped-defs
"""The Triton kernels on logits: the sums of a row, with its gradient where that is made in place, or the gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from dwt_kernels.on_triton.constants import (
    FACTOR,
    HARD_GRADIENT,
    HARD_TERM,
    KL_SUM,
    LABEL_LOGIT,
    LABEL_TERM,
    LOG2_E,
    NO_RESIDUAL,
    RESIDUAL,
    SOFT_GRADIENT,
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
from dwt_kernels.on_triton.steps import (
    head_of,
    merged,
    rest_places,
    row_pointer,
    scan_row,
    write_gradient_block,
    write_zeros,
)

# A chunk's labels start at any row; compiling a kernel for each alignment of them would gain nothing.
ROW_SLICES = ("labels", "upstream")


@triton.jit(do_not_specialize_on_alignment=ROW_SLICES)
def statistics_kernel(
    student,
    student_bias,
    teacher,
    teacher_bias,
    labels,
    statistics,
    scalars,
    upstream,
    student_row_stride,
    student_column_stride,
    teacher_row_stride,
    teacher_column_stride,
    label_stride,
    upstream_stride,
    ignore_index,
    V: tl.constexpr,
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL_STEPS: tl.constexpr,
    TAIL_WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SOFT_ALL: tl.constexpr,
    IN_PLACE_GRADIENT: tl.constexpr,
):
    """Program = row: its statistics and, IN_PLACE_GRADIENT, the gradient over the student's row.

    Args:
        student, teacher: (N, V) logits, any strides; teacher may be None.
        student_bias, teacher_bias: (V,) contiguous or None, added to the logits.
        labels: (N,) int64.
        statistics: (N, 7) fp32, written, see ``layout.Statistics``; not on rows that do not count.
        scalars: (8,) fp64, see ``layout.Scalars``.
        upstream: (N,) fp32 (stride 0: one for all): what multiplies a row's loss.
        FIRST .. ALIGNMENT: see ``launch.Tile``.
    """
    row_index = tl.program_id(0).to(tl.int64)
    # Before the branch on the label, so that one wait covers them.
    label = tl.load(labels + row_index * label_stride)
    factor = tl.load(scalars + FACTOR).to(tl.float32)
    residual = tl.load(scalars + RESIDUAL).to(tl.float32)
    labelled = label != ignore_index
    head = head_of(row_index, student_row_stride, ALIGNMENT, WIDTH)
    student_pointer = row_pointer(student, row_index, student_row_stride, head, WIDTH)
    BLOCK: tl.constexpr = STEPS * LANES * WIDTH
    if not SOFT_ALL and not labelled:
        if IN_PLACE_GRADIENT:
            for start in range(FIRST, FIRST + WHOLE, BLOCK):
                write_zeros(student_pointer, student_column_stride, start + tl.arange(0, BLOCK), None)
            if WHOLE < V:
                rest, mask = rest_places(head, V, FIRST, WHOLE, TAIL_STEPS, LANES, TAIL_WIDTH)
                write_zeros(student_pointer, student_column_stride, rest, mask)
        return
    # A label out of range is reported when the scalars are prepared; here it must not read outside the row.
    label = head + tl.where(labelled & (label >= 0) & (label < V), label, 0)
    label_logit = tl.load(student_pointer + label * student_column_stride).to(tl.float32)
    if student_bias is not None:
        student_bias -= head
        label_logit += tl.load(student_bias + label).to(tl.float32)
    if teacher_bias is not None:
        teacher_bias -= head
    if teacher is None:
        row = student_pointer, student_bias, student_column_stride, None, None, 1
    else:
        teacher_pointer = row_pointer(teacher, row_index, teacher_row_stride, head, WIDTH)
        row = student_pointer, student_bias, student_column_stride, teacher_pointer, teacher_bias, teacher_column_stride
    # At tau = 1 the student's two sums are one, which saves an exponential in three.
    if (factor == LOG2_E) & (residual == NO_RESIDUAL):
        state = scan_row(
            row, head, factor, residual, V, FIRST, WHOLE, STEPS, LANES, WIDTH, TAIL_STEPS, TAIL_WIDTH, True
        )
    else:
        state = scan_row(
            row, head, factor, residual, V, FIRST, WHOLE, STEPS, LANES, WIDTH, TAIL_STEPS, TAIL_WIDTH, False
        )
    state = merged(state, factor, residual, teacher is not None)
    student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = state
    row_statistics = statistics + row_index * STATISTICS
    tl.store(row_statistics + STUDENT_MAX, student_max)
    tl.store(row_statistics + STUDENT_SUM, student_sum)
    tl.store(row_statistics + STUDENT_TAU_SUM, student_tau_sum)
    tl.store(row_statistics + TEACHER_MAX, teacher_max)
    tl.store(row_statistics + TEACHER_SUM, teacher_sum)
    tl.store(row_statistics + KL_SUM, kl_sum)
    tl.store(row_statistics + LABEL_LOGIT, label_logit - student_max)
    if IN_PLACE_GRADIENT:
        row_upstream = tl.load(upstream + row_index * upstream_stride)
        hard_scale = tl.where(labelled, row_upstream * tl.load(scalars + HARD_GRADIENT).to(tl.float32), 0.0)
        soft_scale = row_upstream * tl.load(scalars + SOFT_GRADIENT).to(tl.float32)
        hard, student_soft, teacher_soft = tl.div_rn(hard_scale, student_sum), 0.0, 0.0
        if teacher is not None:
            student_soft = tl.div_rn(soft_scale, student_tau_sum)
            teacher_soft = tl.div_rn(soft_scale, teacher_sum)
        terms = student_max, teacher_max, hard, student_soft, teacher_soft, hard_scale
        # The row was read a moment ago: what is still in the L2 cache is not read from memory again.
        for start in range(FIRST, FIRST + WHOLE, BLOCK):
            places = start + tl.arange(0, BLOCK)
            write_gradient_block(row[0], row[2], row, label, terms, factor, residual, places, None)
        if WHOLE < V:
            rest, mask = rest_places(head, V, FIRST, WHOLE, TAIL_STEPS, LANES, TAIL_WIDTH)
            write_gradient_block(row[0], row[2], row, label, terms, factor, residual, rest, mask)


@triton.jit(do_not_specialize_on_alignment=ROW_SLICES)
def gradient_kernel(
    out,
    student,
    teacher,
    labels,
    terms,
    scalars,
    out_row_stride,
    student_row_stride,
    student_column_stride,
    teacher_row_stride,
    teacher_column_stride,
    label_stride,
    ignore_index,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_ALIGNMENT: tl.constexpr,
    SOFT_ALL: tl.constexpr,
):
    """Program = (row, block of columns): the gradient of upstream x loss into ``out``.

    ``out`` (N, V) has unit column stride, ``terms`` (N, 6) are ``layout.RowTerms``, the others as in
    ``statistics_kernel``.
    """
    row_index = tl.program_id(0).to(tl.int64)
    head = head_of(row_index, out_row_stride, OUT_ALIGNMENT, WIDTH)
    out_pointer = row_pointer(out, row_index, out_row_stride, head, WIDTH)
    student_pointer = row_pointer(student, row_index, student_row_stride, head, WIDTH)
    if teacher is None:
        row = student_pointer, None, student_column_stride, None, None, 1
    else:
        teacher_pointer = row_pointer(teacher, row_index, teacher_row_stride, head, WIDTH)
        row = student_pointer, None, student_column_stride, teacher_pointer, None, teacher_column_stride
    start = tl.program_id(1) * BLOCK
    places = start + tl.arange(0, BLOCK)
    in_row = (places >= head) & (places < head + V)
    whole = (start >= head) & (start + BLOCK <= head + V)
    # Every small load before the branch on the label, so that one wait covers them. The logits come after it: where
    # most rows do not count, as in a masked LM, reading theirs would double the memory traffic.
    label = tl.load(labels + row_index * label_stride)
    row_terms = terms + row_index * TERMS
    values = (
        tl.load(row_terms + STUDENT_MAX_TERM),
        tl.load(row_terms + TEACHER_MAX_TERM),
        tl.load(row_terms + HARD_TERM),
        tl.load(row_terms + STUDENT_SOFT_TERM),
        tl.load(row_terms + TEACHER_SOFT_TERM),
        tl.load(row_terms + LABEL_TERM),
    )
    factor = tl.load(scalars + FACTOR).to(tl.float32)
    residual = tl.load(scalars + RESIDUAL).to(tl.float32)
    if not SOFT_ALL and label == ignore_index:
        if whole:
            write_zeros(out_pointer, 1, places, None)
        else:
            write_zeros(out_pointer, 1, places, in_row)
    elif whole:
        write_gradient_block(out_pointer, 1, row, label + head, values, factor, residual, places, None)
    else:
        write_gradient_block(out_pointer, 1, row, label + head, values, factor, residual, places, in_row)
