"""The rows on plain torch: the CPU's path, and a GPU's where there is no Triton.

Everything goes through the cache in blocks of rows, so that the dozen elementwise passes of a block read and write the
cache and only the first and the last touch memory. Extra memory: three fp32 buffers of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dwt_kernels import arguments
from dwt_kernels.arguments import Objective
from dwt_kernels.layout import LOG2_E_FP32, NO_RESIDUAL, STATISTICS, Scalars
from dwt_kernels.on_torch import fusion
from dwt_kernels.on_torch.blocks import GPU_BLOCK_ELEMENTS
from dwt_kernels.on_torch.formulas import block_gradient, block_statistics, row_factors
from dwt_kernels.on_torch.scalars import compute_scalars

# Elements of a block for each thread: 1 MiB in fp32. Smaller blocks lose to the cost of starting an operation
# (65,536: 1.4 times slower on a Zen 5 core), larger ones leave the cache.
BLOCK_ELEMENTS = 1 << 18


def prepare(labels: Tensor, vocab_size: int, objective: Objective) -> Tensor:
    """The ``Scalars`` as (8,) fp64; bad values raise on a CPU and are asserted on a GPU."""
    arguments.check_values(labels, vocab_size, objective)
    return compute_scalars(labels, objective)


def row_statistics(
    student: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    scalars: Tensor,
    ignore_index: int,
    soft_all: bool,
) -> Tensor:
    """``Statistics`` (N, 7) fp32; anything finite on rows that do not count."""
    rows = student.shape[0]
    # Ones, so that the logarithm of a sum that is not used is finite.
    statistics = student.new_ones(rows, STATISTICS, dtype=torch.float32)
    labelled = labels != ignore_index
    label_columns = labels.where(labelled, 0)
    named = Scalars(*scalars.unbind())
    constants = exponent_constants(named)
    student_bias, teacher_bias = fp32(student_bias), fp32(teacher_bias)
    for index, buffers in row_blocks(student, counted_rows(labelled, soft_all, teacher)):
        teacher_block = None if teacher is None else teacher[index]
        statistics[index] = block_statistics(
            buffers, student[index], student_bias, teacher_block, teacher_bias, label_columns[index], *constants
        )
    return statistics


def row_gradients(
    upstream: Tensor,
    scalars: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    ignore_index: int,
    soft_all: bool,
    out: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> None:
    """Write the gradient of upstream x (hard and soft loss, scaled) into ``out`` (N, V), which may be ``student``.

    ``upstream`` is 0-d or (N,).
    """
    labelled = labels != ignore_index
    counted = counted_rows(labelled, soft_all, teacher)
    named = Scalars(*scalars.unbind())
    student_bias, teacher_bias = fp32(student_bias), fp32(teacher_bias)
    label_columns = labels.where(labelled, 0)
    factors = row_factors(upstream.expand(labels.shape), labelled, statistics, scalars)
    constants = exponent_constants(named)
    rows = fusion.RowInputs(student, teacher, statistics, factors)
    # The fused code takes every row, which repays where most count. What it makes of the others is overwritten.
    most_count = counted is None or 2 * counted.shape[0] >= labels.shape[0]
    if most_count and fusion.pays(student):
        fusion.write_gradient(rows, student_bias, teacher_bias, label_columns, named, constants[-1], out)
    else:
        for index, buffers in row_blocks(student, counted):
            gradient = block_gradient(
                buffers,
                student[index],
                student_bias,
                None if teacher is None else teacher[index],
                teacher_bias,
                label_columns[index],
                statistics[index],
                factors[index],
                *constants,
            )
            out[index] = gradient if isinstance(index, slice) else gradient.to(out.dtype)
    if counted is not None:
        out.index_fill_(0, (~labelled).nonzero().squeeze(1), 0)
    elif out.device.type != "cpu" and not (soft_all and teacher is not None):
        out.masked_fill_(~labelled.unsqueeze(1), 0)


def row_statistics_and_gradients(
    upstream: Tensor,
    scalars: Tensor,
    student: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    soft_all: bool,
) -> Tensor:
    """``Statistics`` (N, 7) fp32; the gradient is written over ``student``."""
    statistics = row_statistics(student, student_bias, teacher, teacher_bias, labels, scalars, ignore_index, soft_all)
    biases = (student_bias, teacher_bias)
    row_gradients(upstream, scalars, student, teacher, labels, statistics, ignore_index, soft_all, student, *biases)
    return statistics


def counted_rows(labelled: Tensor, soft_all: bool, teacher: Tensor | None) -> Tensor | None:
    """Indices of the rows that count, or None for all of them.

    On a GPU all rows are computed and those that do not count are masked: finding them takes a host synchronisation.
    """
    if (soft_all and teacher is not None) or labelled.device.type != "cpu" or bool(labelled.all()):
        return None
    return labelled.nonzero().squeeze(1)


def row_blocks(logits: Tensor, counted: Tensor | None) -> Iterator[tuple[slice | Tensor, Sequence[Tensor]]]:
    """Blocks of rows, nearly equal in size, each with three fp32 buffers of its shape.

    A block is a slice, or indices where only some rows count. The buffers are the same memory for all blocks: fresh
    temporaries of this size go back to the operating system at every free, and its page faults cost more than the
    arithmetic.
    """
    rows, columns = logits.shape
    if counted is not None:
        rows = counted.shape[0]
    on_cpu = logits.device.type == "cpu"
    elements = BLOCK_ELEMENTS * torch.get_num_threads() if on_cpu else GPU_BLOCK_ELEMENTS
    blocks = -(-rows // max(1, elements // columns))
    workspace = logits.new_empty(3, -(-rows // max(1, blocks)), columns, dtype=torch.float32)
    for block in range(blocks):
        start, stop = rows * block // blocks, rows * (block + 1) // blocks
        yield slice(start, stop) if counted is None else counted[start:stop], workspace[:, : stop - start].unbind(0)


def fp32(bias: Tensor | None) -> Tensor | None:
    """Converted once: torch's mixed-dtype additions are several times slower on a CPU."""
    return None if bias is None else bias.float()


def exponent_constants(scalars: Scalars) -> tuple[Tensor, float | Tensor, bool]:
    """factor, residual, and whether tau is 1, which only a CPU knows without a synchronisation."""
    factor, residual = scalars.factor.float(), scalars.residual.float()
    if factor.device.type != "cpu":
        return factor, residual, False
    return factor, residual.item(), factor.item() == LOG2_E_FP32 and residual.item() == NO_RESIDUAL
