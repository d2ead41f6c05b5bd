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
from dwt_kernels.triton_scalars import losses_kernel, prepare_kernel, reduce_kernel, scale_kernel

# Columns that a thread has of either model at a time, and warps that share a row in the kernel of statistics: under 80
# registers, so that three programs or more fit a multiprocessor. A whole row of 32k at once leaves one of 32 warps.
COLUMNS_PER_THREAD = 16
ROW_WARPS = 8
THREADS_PER_WARP = 64 if torch.version.hip else 32
LOAD_BYTES = 16

# A program of the gradient does one block and ends: five or six of four warps fit a multiprocessor; some load while
# others compute; of twice this size it would be two.
GRADIENT_BLOCK = 2048
GRADIENT_WARPS = 4

# Labels or row losses a step of the kernels that are one program; rows a program of the one from statistics to losses.
SCALAR_BLOCK = 4096
SCALAR_WARPS = 8
LOSSES_BLOCK = 128

# Elements of a gradient that meets its upstream gradient: 16 a thread.
SCALE_BLOCK = 4096
SCALE_WARPS = 8


class Tile(NamedTuple):
    """Columns of a row at a time: each of ``lanes`` threads loads ``width`` neighbours at ``steps`` places.

    ``tail_steps``: as many as the last, partial block needs.
    """

    steps: int
    tail_steps: int
    lanes: int
    width: int

    @property
    def num_warps(self) -> int:
        return max(1, self.lanes // THREADS_PER_WARP)


def row_tile(student: Tensor, teacher: Tensor | None) -> Tile:
    """No wider than the alignment of both models' rows, at which the compiler will load."""
    matrices = [each for each in (student, teacher) if each is not None]
    width = min(min(LOAD_BYTES // each.element_size(), alignment(each)) for each in matrices)
    if any(each.stride(1) != 1 for each in matrices):
        width = 1
    columns = student.shape[1]
    room = triton.next_power_of_2(columns)
    width = min(width, room)
    lanes = min(ROW_WARPS * THREADS_PER_WARP, max(1, room // COLUMNS_PER_THREAD))
    steps = min(COLUMNS_PER_THREAD // width, max(1, room // (lanes * width)))
    rest = columns % (steps * lanes * width)
    return Tile(steps, triton.next_power_of_2(max(1, triton.cdiv(rest, lanes * width))), lanes, width)


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
        num_warps=SCALAR_WARPS,
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
    tile = row_tile(student, teacher)
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
        STEPS=tile.steps,
        TAIL_STEPS=tile.tail_steps,
        LANES=tile.lanes,
        WIDTH=tile.width,
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
    rows = hard.shape[0]
    launch(reduce_kernel, (1,), hard, soft, scalars, *results, rows, BLOCK=SCALAR_BLOCK, num_warps=SCALAR_WARPS)
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
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(columns))
    launch(
        gradient_kernel,
        (rows, triton.cdiv(columns, block)),
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
        BLOCK=block,
        OUT_ALIGNMENT=alignment(out),
        STUDENT_ALIGNMENT=alignment(student),
        TEACHER_ALIGNMENT=alignment(teacher),
        SOFT_ALL=soft_all and teacher is not None,
        num_warps=max(1, GRADIENT_WARPS * block // GRADIENT_BLOCK),
        enable_fp_fusion=True,
    )


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` (contiguous) x ``factor`` (0-d fp32), multiplied in fp32 and rounded once; always new memory."""
    out = torch.empty_like(tensor, dtype=dtype)
    if tensor.numel() > 0:
        programs = (triton.cdiv(tensor.numel(), SCALE_BLOCK),)
        launch(scale_kernel, programs, out, tensor, factor, tensor.numel(), BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS)
    return out


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
