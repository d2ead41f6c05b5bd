"""Launches the Triton kernels: same functions, same arguments as ``torch_backend``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dwt_kernels import arguments
from dwt_kernels.arguments import Objective
from dwt_kernels.row_formulas import STATISTICS
from dwt_kernels.scalars import Scalars
from dwt_kernels.scalars import reduce_rows as torch_reduce_rows
from dwt_kernels.triton_kernels import gradient_kernel, statistics_kernel
from dwt_kernels.triton_launch import launch
from dwt_kernels.triton_scalars import losses_kernel, prepare_kernel, reduce_kernel

# The largest tile of a row. 4,096 columns on 8 warps are 16 logits of either model a thread: under 80 registers, so
# that three programs share a multiprocessor and one loads while another waits at a reduction. A whole row of 32k in
# one tile leaves one program of 32 warps, and nothing to hide its waits (others measured 5% of the bandwidth there).
MAX_BLOCK = 4096
COLUMNS_PER_WARP = 512

# Labels or row losses a step of the kernels that are one program; rows a program of the one from statistics to losses.
SCALAR_BLOCK = 1024
LOSSES_BLOCK = 128


class Tile(NamedTuple):
    block: int
    num_warps: int


def row_tile(columns: int) -> Tile:
    block = min(MAX_BLOCK, triton.next_power_of_2(columns))
    return Tile(block, max(1, block // COLUMNS_PER_WARP))


def prepare(labels: Tensor, vocab_size: int, objective: Objective) -> Tensor:
    """The ``Scalars`` as (8,) fp64; bad values raise on a CPU and are asserted on a GPU."""
    if labels.device.type == "cpu":
        arguments.check_values(labels, vocab_size, objective)
    scalars = torch.empty(len(Scalars._fields), dtype=torch.float64, device=labels.device)
    valid = torch.empty((), dtype=torch.int32, device=labels.device)
    launch(
        prepare_kernel,
        (1,),
        labels,
        objective.temperature,
        objective.hard_weight,
        objective.soft_weight,
        objective.hard_normalizer,
        objective.soft_normalizer,
        scalars,
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
    return scalars


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
    """(N, 7) fp32 as in ``row_formulas``; not set on rows that do not count."""
    return _launch_statistics(
        None, scalars, student, student_bias, teacher, teacher_bias, labels, ignore_index, soft_all
    )


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
    """Statistics (N, 7); the gradient is written over ``student``."""
    return _launch_statistics(
        upstream, scalars, student, student_bias, teacher, teacher_bias, labels, ignore_index, soft_all
    )


def _launch_statistics(
    upstream: Tensor | None,
    scalars: Tensor,
    student: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    soft_all: bool,
) -> Tensor:
    rows, columns = student.shape
    statistics = torch.empty(rows, STATISTICS, dtype=torch.float32, device=student.device)
    if rows == 0:
        return statistics
    tile = row_tile(columns)
    launch(
        statistics_kernel,
        (rows,),
        student,
        contiguous(student_bias),
        teacher,
        contiguous(teacher_bias),
        labels,
        statistics,
        scalars,
        upstream,
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
    return statistics


def row_losses(
    statistics: Tensor, scalars: Tensor, labels: Tensor, ignore_index: int, soft_all: bool, has_teacher: bool
) -> tuple[Tensor, Tensor]:
    """hard (N,) and soft (N,) fp32 as ``scalars.row_losses``."""
    rows = labels.shape[0]
    hard, soft = (torch.empty(rows, dtype=torch.float32, device=labels.device) for _ in range(2))
    if rows > 0:
        launch(
            losses_kernel,
            (triton.cdiv(rows, LOSSES_BLOCK),),
            statistics,
            scalars,
            labels,
            hard,
            soft,
            rows,
            labels.stride(0),
            ignore_index,
            BLOCK=LOSSES_BLOCK,
            HAS_TEACHER=has_teacher,
            SOFT_ALL=soft_all and has_teacher,
        )
    return hard, soft


def reduce_rows(hard: Tensor, soft: Tensor, scalars: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hard, soft) as ``scalars.reduce_rows``."""
    if reduction == "none":
        return torch_reduce_rows(hard, soft, scalars, reduction)
    results = [torch.empty((), dtype=torch.float32, device=hard.device) for _ in range(3)]
    launch(reduce_kernel, (1,), hard, soft, scalars, *results, hard.shape[0], BLOCK=SCALAR_BLOCK)
    loss, hard_mean, soft_mean = results
    return loss, hard_mean, soft_mean


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
) -> None:
    """Write the gradient of upstream x loss into ``out`` (N, V), which has unit column stride."""
    rows, columns = student.shape
    if rows == 0:
        return
    tile = row_tile(columns)
    launch(
        gradient_kernel,
        (rows, triton.cdiv(columns, tile.block)),
        out,
        student,
        teacher,
        labels,
        statistics,
        scalars,
        upstream,
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
