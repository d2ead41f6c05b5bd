# mypy: allow-untyped-defs, disable-error-code="assignment"
"""A row that is loaded once. It stays in registers, as it was in memory, until its sums and its gradient are made.

Legend as in ``steps``. A thread has WIDTH neighbours of every block of LANES x WIDTH columns. They are kept as the
32-bit words that were loaded: every 16-bit number for itself would take a register, as would one converted to fp32.
Rows must be aligned to WIDTH columns, so that WIDTH x ceil(V / WIDTH) of them can be read and written.

The gradient adds ``zero`` to the words, of which the compiler does not know that it is 0. Otherwise it may keep the
logits that the sums made of them for the gradient: with Triton 3.6 a thread then spills 536 bytes on sm_90a, so 32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwt_kernels.on_triton.constants import MINUS_INF
from dwt_kernels.on_triton.steps import add_bias, add_block, empty_state, gradient_of, lane_columns


@triton.jit
def load_words(pointer, V: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """A row's words: for each block (1, LANES x words in WIDTH columns) int32; nothing without a ``pointer``."""
    blocks = ()
    if pointer is not None:
        WORDS: tl.constexpr = WIDTH * pointer.dtype.element_ty.primitive_bitwidth // 32
        for block in tl.static_range((V + LANES * WIDTH - 1) // (LANES * WIDTH)):
            words = lane_columns(block * (LANES * WORDS), 1, LANES, WORDS)
            inside = words < (V + WIDTH - 1) // WIDTH * WORDS
            blocks += (tl.load(pointer.to(tl.pointer_type(tl.int32)) + words, mask=inside, other=0),)
    return blocks


@triton.jit
def logits_of(words, zero, block: tl.constexpr, pointer, bias, columns, V: tl.constexpr, BLOCK: tl.constexpr):
    """A block's fp32 logits, bias included, -inf past the last column."""
    logits = words[block] + zero
    if pointer.dtype.element_ty.primitive_bitwidth != 32:
        logits = tl.join(logits.to(tl.int16), (logits >> 16).to(tl.int16))
    logits = tl.reshape(logits, columns.shape).to(pointer.dtype.element_ty, bitcast=True).to(tl.float32)
    if (block + 1) * BLOCK <= V:
        return add_bias(logits, bias, columns, None)
    else:
        return tl.where(columns < V, add_bias(logits, bias, columns, columns < V), MINUS_INF)


@triton.jit
def student_logits(row, words, zero, block: tl.constexpr, columns, V: tl.constexpr, BLOCK: tl.constexpr):
    return logits_of(words[0], zero, block, row[0], row[1], columns, V, BLOCK)


@triton.jit
def teacher_logits(row, words, zero, block: tl.constexpr, columns, V: tl.constexpr, BLOCK: tl.constexpr):
    return logits_of(words[1], zero, block, row[3], row[4], columns, V, BLOCK)


@triton.jit
def sums_of_row(
    row,
    words,
    factor,
    residual,
    V: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr,
):
    """As ``steps.scan_row``."""
    state = empty_state(LANES)
    for block in tl.static_range((V + LANES * WIDTH - 1) // (LANES * WIDTH)):
        columns = lane_columns(block * (LANES * WIDTH), 1, LANES, WIDTH)
        student = student_logits(row, words, 0, block, columns, V, LANES * WIDTH)
        if row[3] is None:
            state = add_block(state, student, None, factor, residual, 1, LANES, WIDTH, UNIT_TEMPERATURE)
        else:
            teacher = teacher_logits(row, words, 0, block, columns, V, LANES * WIDTH)
            state = add_block(state, student, teacher, factor, residual, 1, LANES, WIDTH, UNIT_TEMPERATURE)
    return state


@triton.jit
def write_gradient_of_row(
    row, words, label, terms, factor, residual, V: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """Over the student's row, and zeros up to the next multiple of WIDTH columns."""
    out = row[0]
    zero = (residual < 0).to(tl.int32)
    for block in tl.static_range((V + LANES * WIDTH - 1) // (LANES * WIDTH)):
        columns = lane_columns(block * (LANES * WIDTH), 1, LANES, WIDTH)
        student = student_logits(row, words, zero, block, columns, V, LANES * WIDTH)
        if row[3] is None:
            gradient = gradient_of(student, None, columns == label, terms, factor, residual)
        else:
            teacher = teacher_logits(row, words, zero, block, columns, V, LANES * WIDTH)
            gradient = gradient_of(student, teacher, columns == label, terms, factor, residual)
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=columns < (V + WIDTH - 1) // WIDTH * WIDTH)
