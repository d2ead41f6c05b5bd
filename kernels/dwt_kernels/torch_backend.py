"""The rows on plain torch: the CPU's path, and a GPU's where there is no Triton.

Everything goes through the cache in blocks of rows, so that the dozen elementwise passes of a block read and write the
cache and only the first and the last touch memory. Extra memory: three fp32 buffers of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dwt_kernels import arguments, cpu_fusion
from dwt_kernels.arguments import Objective
from dwt_kernels.row_formulas import STATISTICS, block_gradient, block_losses, label_share
from dwt_kernels.scales import loss_scales, reduce_rows

__all__ = ["prepare", "reduce_rows", "row_gradients", "row_losses", "row_losses_and_gradients"]

# Elements of a block for each thread: 1 MiB in fp32. Smaller blocks lose to the cost of starting an operation
# (65,536: 1.4 times slower on a Zen 5 core), larger ones leave the cache.
BLOCK_ELEMENTS = 1 << 18


def prepare(labels: Tensor, vocab_size: int, objective: Objective) -> Tensor:
    """The scales (4,) fp64 of ``scales.loss_scales``; bad values raise on a CPU and are asserted on a GPU."""
    arguments.check_values(labels, vocab_size, objective)
    return loss_scales(labels, objective)


def row_losses(
    student: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    ignore_index: int,
    soft_all: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hard loss (N,), soft loss (N,) and statistics (N, 5), all fp32; zero on rows that do not count."""
    rows = student.shape[0]
    hard, soft = labels.new_zeros(rows, dtype=torch.float32), labels.new_zeros(rows, dtype=torch.float32)
    statistics = labels.new_zeros(rows, STATISTICS, dtype=torch.float32)
    labelled = labels != ignore_index
    counted = counted_rows(labelled, soft_all, teacher)
    unit_temperature = is_one(temperature)
    student_bias, teacher_bias = fp32(student_bias), fp32(teacher_bias)
    for index, buffers in row_blocks(student, counted, buffers=3):
        hard[index], soft[index], statistics[index] = block_losses(
            buffers,
            student[index],
            student_bias,
            None if teacher is None else teacher[index],
            teacher_bias,
            labels[index],
            labelled[index],
            temperature,
            unit_temperature,
        )
    if not soft_all:
        # On a GPU the rows to skip were computed all the same.
        soft.masked_fill_(~labelled, 0)
    return hard, soft, statistics


def row_gradients(
    upstream: Tensor,
    scales: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    statistics: Tensor,
    ignore_index: int,
    soft_all: bool,
    out: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> None:
    """Write the gradient of upstream x (scales[0] x hard + scales[1] x soft) into ``out`` (N, V).

    ``upstream`` is 0-d or (N,), ``scales`` (2,) fp64; ``out`` may be ``student`` itself.
    """
    rows = student.shape[0]
    labelled = labels != ignore_index
    counted = counted_rows(labelled, soft_all, teacher)
    unit_temperature = is_one(temperature)
    upstream, scales = upstream.float().expand(rows), scales.float()
    row_inputs = (upstream, student, teacher, labels, labelled, statistics)
    whole_inputs = (scales, fp32(student_bias), fp32(teacher_bias), temperature, unit_temperature)
    if counted is None and cpu_fusion.pays(student) and cpu_fusion.write_gradient(*row_inputs, *whole_inputs, out):
        return
    for index, buffers in row_blocks(student, counted, buffers=2):
        gradient = block_gradient(
            buffers,
            upstream[index],
            student[index],
            None if teacher is None else teacher[index],
            labelled[index],
            statistics[index],
            *whole_inputs,
        )
        gradient.scatter_add_(1, *label_share(upstream[index], labels[index], labelled[index], scales))
        out[index] = gradient if isinstance(index, slice) else gradient.to(out.dtype)
    if counted is not None or out.device.type != "cpu":
        every_row = soft_all and teacher is not None
        out.masked_fill_(~(labelled | every_row).unsqueeze(1), 0)


def row_losses_and_gradients(
    upstream: Tensor,
    scales: Tensor,
    student: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    ignore_index: int,
    soft_all: bool,
) -> tuple[Tensor, Tensor]:
    """Hard and soft losses (N,); the gradient is written over ``student``."""
    hard, soft, statistics = row_losses(
        student, student_bias, teacher, teacher_bias, labels, temperature, ignore_index, soft_all
    )
    row_gradients(
        upstream,
        scales,
        student,
        teacher,
        labels,
        temperature,
        statistics,
        ignore_index,
        soft_all,
        student,
        student_bias,
        teacher_bias,
    )
    return hard, soft


def counted_rows(labelled: Tensor, soft_all: bool, teacher: Tensor | None) -> Tensor | None:
    """Indices of the rows that count, or None for all of them.

    On a GPU all are computed and those that do not count masked: to know them would take a host synchronisation.
    """
    if (soft_all and teacher is not None) or labelled.device.type != "cpu" or bool(labelled.all()):
        return None
    return labelled.nonzero().squeeze(1)


def row_blocks(
    logits: Tensor, counted: Tensor | None, buffers: int
) -> Iterator[tuple[slice | Tensor, Sequence[Tensor]]]:
    """Blocks of rows, nearly equal in size, each with ``buffers`` fp32 buffers of its shape.

    A block is a slice, or indices where only some rows count. The buffers are the same memory for all blocks: fresh
    temporaries of this size go back to the operating system at every free, and its page faults cost more than the
    arithmetic.
    """
    rows, columns = logits.shape
    if counted is not None:
        rows = counted.shape[0]
    blocks = -(-rows // max(1, BLOCK_ELEMENTS * torch.get_num_threads() // columns))
    workspace = logits.new_empty(buffers, -(-rows // max(1, blocks)), columns, dtype=torch.float32)
    for block in range(blocks):
        start, stop = rows * block // blocks, rows * (block + 1) // blocks
        yield slice(start, stop) if counted is None else counted[start:stop], workspace[:, : stop - start].unbind(0)


def fp32(bias: Tensor | None) -> Tensor | None:
    """Converted once: torch's mixed-dtype additions are several times slower on a CPU."""
    return None if bias is None else bias.float()


def is_one(temperature: Tensor) -> bool:
    """Known without a synchronisation on a CPU only."""
    return temperature.device.type == "cpu" and temperature.item() == 1
