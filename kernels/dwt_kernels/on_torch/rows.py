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
from dwt_kernels.layout import LOG2_E_FP32, NO_RESIDUAL, STATISTICS, Labels, Logits, Scalars
from dwt_kernels.on_torch import fusion
from dwt_kernels.on_torch.blocks import GPU_BLOCK_ELEMENTS
from dwt_kernels.on_torch.formulas import Exponent, block_gradient, block_statistics, row_factors
from dwt_kernels.on_torch.scalars import compute_scalars

# Elements of a block for each thread: 1 MiB in fp32. Smaller blocks lose to the cost of starting an operation
# (65,536: 1.4 times slower on a Zen 5 core), larger ones leave the cache.
BLOCK_ELEMENTS = 1 << 18


def prepare(labels: Tensor, vocab_size: int, objective: Objective) -> Tensor:
    """The ``Scalars`` as (8,) fp64; bad values raise on a CPU and are asserted on a GPU."""
    arguments.check_values(labels, vocab_size, objective)
    return compute_scalars(labels, objective)


def row_statistics(logits: Logits, labels: Labels, scalars: Tensor) -> Tensor:
    """``Statistics`` (N, 7) fp32; anything finite on rows that do not count."""
    # Ones, so that the logarithm of a sum that is not used is finite.
    statistics = logits.student.new_ones(logits.student.shape[0], STATISTICS, dtype=torch.float32)
    label_columns = labels.values.where(labels.labelled, 0)
    exponent, logits = exponent_of(scalars), with_fp32_biases(logits)
    for index, buffers in row_blocks(logits.student, labels.counted()):
        statistics[index] = block_statistics(buffers, of_rows(logits, index), label_columns[index], exponent)
    return statistics


def row_gradients(
    upstream: Tensor, scalars: Tensor, logits: Logits, labels: Labels, statistics: Tensor, out: Tensor
) -> None:
    """Write the gradient of upstream x (hard and soft loss, scaled) into ``out`` (N, V), which may be the student's.

    ``upstream`` is 0-d or (N,).
    """
    labelled, counted = labels.labelled, labels.counted()
    exponent, logits = exponent_of(scalars), with_fp32_biases(logits)
    label_columns = labels.values.where(labelled, 0)
    factors = row_factors(upstream.expand(labelled.shape), labelled, statistics, scalars)
    # The fused code takes every row, which repays where most count. What it makes of the others is overwritten.
    most_count = counted is None or 2 * counted.shape[0] >= labelled.shape[0]
    if most_count and fusion.pays(logits.student):
        fusion.write_gradient(logits, label_columns, statistics, factors, exponent, out)
    else:
        for index, buffers in row_blocks(logits.student, counted):
            rows = (of_rows(logits, index), label_columns[index], statistics[index], factors[index])
            gradient = block_gradient(buffers, *rows, exponent)
            out[index] = gradient if isinstance(index, slice) else gradient.to(out.dtype)
    if counted is not None:
        out.index_fill_(0, (~labelled).nonzero().squeeze(1), 0)
    elif out.device.type != "cpu" and not labels.soft_all:
        out.masked_fill_(~labelled.unsqueeze(1), 0)


def row_statistics_and_gradients(upstream: Tensor, scalars: Tensor, logits: Logits, labels: Labels) -> Tensor:
    """``Statistics`` (N, 7) fp32; the gradient is written over the student's logits."""
    statistics = row_statistics(logits, labels, scalars)
    row_gradients(upstream, scalars, logits, labels, statistics, logits.student)
    return statistics


def of_rows(logits: Logits, index: slice | Tensor) -> Logits:
    teacher = None if logits.teacher is None else logits.teacher[index]
    return logits._replace(student=logits.student[index], teacher=teacher)


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


def with_fp32_biases(logits: Logits) -> Logits:
    """Converted once: torch's mixed-dtype additions are several times slower on a CPU."""
    student, teacher = (None if bias is None else bias.float() for bias in (logits.student_bias, logits.teacher_bias))
    return logits._replace(student_bias=student, teacher_bias=teacher)


def exponent_of(scalars: Tensor) -> Exponent:
    """``Exponent`` from the scalars. Only on a CPU is it known without a synchronisation whether tau is 1."""
    named = Scalars(*scalars.unbind())
    factor, residual = named.factor.float(), named.residual.float()
    if factor.device.type != "cpu":
        return Exponent(factor, residual, False)
    return Exponent(factor, residual.item(), factor.item() == LOG2_E_FP32 and residual.item() == NO_RESIDUAL)
