"""Launches the Triton kernels: same functions, same arguments as ``torch_backend``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dwt_kernels import arguments
from dwt_kernels.arguments import Objective
from dwt_kernels.row_formulas import STATISTICS
from dwt_kernels.scales import reduce_rows as torch_reduce_rows
from dwt_kernels.triton_kernels import gradient_kernel, losses_kernel
from dwt_kernels.triton_scalars import prepare_kernel, reduce_kernel

# The largest tile of a row. 4,096 columns on 8 warps are 16 logits of either model a thread: under 80 registers, so
# that three programs share a multiprocessor and one loads while another waits at a reduction. A whole row of 32k in
# one tile leaves one program of 32 warps, and nothing to hide its waits (others measured 5% of the bandwidth there).
MAX_BLOCK = 4096
COLUMNS_PER_WARP = 512

# Labels or row losses a step of the one-program kernels.
SCALAR_BLOCK = 1024


class Tile(NamedTuple):
    block: int
    num_warps: int


def row_tile(columns: int) -> Tile:
    block = min(MAX_BLOCK, triton.next_power_of_2(columns))
    return Tile(block, max(1, block // COLUMNS_PER_WARP))


def prepare(labels: Tensor, vocab_size: int, objective: Objective) -> Tensor:
    """The scales (4,) fp64 of ``scales.loss_scales``; bad values raise on a CPU and are asserted on a GPU."""
    if labels.device.type == "cpu":
        arguments.check_values(labels, vocab_size, objective)
    scales = torch.empty(4, dtype=torch.float64, device=labels.device)
    valid = torch.empty((), dtype=torch.int32, device=labels.device)
    prepare_kernel[(1,)](
        labels,
        objective.temperature,
        objective.hard_weight,
        objective.soft_weight,
        objective.hard_normalizer,
        objective.soft_normalizer,
        scales,
        valid,
        labels.shape[0],
        labels.stride(0),
        objective.ignore_index,
        vocab_size,
        BLOCK=SCALAR_BLOCK,
        MEAN=objective.reduction == "mean",
        SOFT_ALL=objective.soft_all,
        TEMPERATURE_SQUARED=objective.temperature_squared,
    )
    if labels.device.type != "cpu":
        torch._assert_async(
            valid, "a label is outside 0 .. vocab_size - 1, or temperature or normalizer is not positive and finite"
        )
    return scales


def reduce_rows(hard: Tensor, soft: Tensor, scales: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hard, soft) as ``scales.reduce_rows``."""
    if reduction == "none":
        return torch_reduce_rows(hard, soft, scales, reduction)
    results = [torch.empty((), dtype=torch.float32, device=hard.device) for _ in range(3)]
    reduce_kernel[(1,)](hard, soft, scales, *results, hard.shape[0], BLOCK=SCALAR_BLOCK)
    loss, hard_mean, soft_mean = results
    return loss, hard_mean, soft_mean


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
    """Hard loss (N,), soft loss (N,) and statistics (N, 5), all fp32; the losses are zero on rows that do not count."""
    statistics = torch.empty(student.shape[0], STATISTICS, dtype=torch.float32, device=student.device)
    hard, soft = _launch_losses(
        None,
        None,
        student,
        student_bias,
        teacher,
        teacher_bias,
        labels,
        temperature,
        statistics,
        ignore_index,
        soft_all,
    )
    return hard, soft, statistics


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
    return _launch_losses(
        upstream,
        scales,
        student,
        student_bias,
        teacher,
        teacher_bias,
        labels,
        temperature,
        None,
        ignore_index,
        soft_all,
    )


def _launch_losses(
    upstream: Tensor | None,
    scales: Tensor | None,
    student: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    statistics: Tensor | None,
    ignore_index: int,
    soft_all: bool,
) -> tuple[Tensor, Tensor]:
    rows, columns = student.shape
    hard, soft = (torch.empty(rows, dtype=torch.float32, device=student.device) for _ in range(2))
    if rows == 0:
        return hard, soft
    tile = row_tile(columns)
    losses_kernel[(rows,)](
        student,
        contiguous(student_bias),
        teacher,
        contiguous(teacher_bias),
        labels,
        temperature,
        hard,
        soft,
        statistics,
        upstream,
        scales,
        *student.stride(),
        *strides(teacher),
        labels.stride(0),
        row_stride(upstream),
        ignore_index,
        V=columns,
        BLOCK=tile.block,
        STUDENT_ALIGNMENT=alignment(student),
        TEACHER_ALIGNMENT=alignment(teacher),
        SOFT_ALL=soft_all and teacher is not None,
        IN_PLACE_GRADIENT=upstream is not None,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )
    return hard, soft


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
) -> None:
    """Write the gradient of upstream x (scales[0] hard + scales[1] soft) into ``out`` (N, V), unit column stride."""
    rows, columns = student.shape
    if rows == 0:
        return
    tile = row_tile(columns)
    gradient_kernel[(rows, triton.cdiv(columns, tile.block))](
        out,
        student,
        teacher,
        labels,
        temperature,
        statistics,
        upstream,
        scales,
        out.stride(0),
        *student.stride(),
        *strides(teacher),
        labels.stride(0),
        row_stride(upstream),
        ignore_index,
        V=columns,
        BLOCK=tile.block,
        OUT_ALIGNMENT=alignment(out),
        STUDENT_ALIGNMENT=alignment(student),
        TEACHER_ALIGNMENT=alignment(teacher),
        SOFT_ALL=soft_all and teacher is not None,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )


def contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def strides(teacher: Tensor | None) -> tuple[int, ...]:
    return (0, 1) if teacher is None else teacher.stride()


def row_stride(upstream: Tensor | None) -> int:
    return 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)


def alignment(matrix: Tensor | None) -> int:
    """The largest power of two up to 16 that divides the offset of every row, in elements."""
    stride = 16 if matrix is None else matrix.stride(0)
    return 16 if stride == 0 else min(16, stride & -stride)
