"""Starts the kernels on logits and the small ones around them: the functions of ``on_torch``, for GPUs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dwt_kernels import arguments
from dwt_kernels.arguments import Objective
from dwt_kernels.layout import SCALARS, STATISTICS, TERMS, Labels, Logits
from dwt_kernels.on_torch.scalars import reduce_rows as torch_reduce_rows
from dwt_kernels.on_triton.launch import (
    THREADS_PER_WARP,
    alignment,
    common_width,
    contiguous,
    launch,
    row_stride,
    row_tile,
    strides,
)
from dwt_kernels.on_triton.row_kernels import gradient_kernel, statistics_kernel
from dwt_kernels.on_triton.scalar_kernels import (
    losses_kernel,
    prepare_kernel,
    reduce_kernel,
    scale_kernel,
    terms_kernel,
)

# A program of the gradient does one block and ends; some load while others compute. A thread has eight columns. With
# 16, its second pair of loads starts only after the first has arrived, and it takes 55 registers: nine programs of four
# warps fit a multiprocessor and load 36 KiB at a time. With eight it takes 32: eight programs of eight warps, all
# threads that there are, load 64 KiB. This is from sm_90a's assembly; it was not timed.
GRADIENT_BLOCK = 2048
GRADIENT_WARPS = 256 // THREADS_PER_WARP

# Labels or row losses a step of the kernels that are one program; rows a program of those that read the statistics.
SCALAR_BLOCK = 4096
SCALAR_WARPS = 8
LOSSES_BLOCK = 128

# Elements of a gradient that meets its upstream gradient: 16 a thread.
SCALE_BLOCK = 4096
SCALE_WARPS = 8


def prepare(labels: Tensor, vocab_size: int, objective: Objective) -> Tensor:
    """The ``Scalars`` as (8,) fp64; bad values raise on a CPU and are asserted on a GPU."""
    if labels.device.type == "cpu":
        arguments.check_values(labels, vocab_size, objective)
    scalars = torch.empty(SCALARS, dtype=torch.float64, device=labels.device)
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


def row_statistics(logits: Logits, labels: Labels, scalars: Tensor, upstream: Tensor | None = None) -> Tensor:
    """``Statistics`` (N, 7) fp32; not set on rows that do not count. With ``upstream``, see the next function."""
    student, teacher, student_bias, teacher_bias = logits
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
        labels.values,
        statistics,
        scalars,
        upstream,
        *student.stride(),
        *strides(teacher),
        labels.values.stride(0),
        row_stride(upstream),
        labels.ignore_index,
        V=columns,
        FIRST=tile.first,
        WHOLE=tile.whole,
        STEPS=tile.steps,
        LANES=tile.lanes,
        WIDTH=tile.width,
        TAIL_STEPS=tile.tail_steps,
        TAIL_WIDTH=tile.tail_width,
        ALIGNMENT=tile.alignment,
        SOFT_ALL=labels.soft_all,
        IN_PLACE_GRADIENT=upstream is not None,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )
    return statistics


def row_statistics_and_gradients(upstream: Tensor, scalars: Tensor, logits: Logits, labels: Labels) -> Tensor:
    """``Statistics`` (N, 7) fp32; the gradient is written over the student's logits."""
    return row_statistics(logits, labels, scalars, upstream)


def row_losses(statistics: Tensor, scalars: Tensor, labels: Labels, has_teacher: bool) -> tuple[Tensor, Tensor]:
    """hard (N,) and soft (N,) fp32 as ``on_torch.row_losses``."""
    rows, device = labels.values.shape[0], labels.values.device
    hard, soft = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    if rows > 0:
        launch(
            losses_kernel,
            (triton.cdiv(rows, LOSSES_BLOCK),),
            statistics,
            scalars,
            labels.values,
            hard,
            soft,
            rows,
            labels.values.stride(0),
            labels.ignore_index,
            BLOCK=LOSSES_BLOCK,
            HAS_TEACHER=has_teacher,
            SOFT_ALL=labels.soft_all,
        )
    return hard, soft


def reduce_rows(hard: Tensor, soft: Tensor, scalars: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hard, soft) as ``on_torch.reduce_rows``."""
    if reduction == "none":
        return torch_reduce_rows(hard, soft, scalars, reduction)
    results = [torch.empty((), dtype=torch.float32, device=hard.device) for _ in range(3)]
    rows = hard.shape[0]
    launch(reduce_kernel, (1,), hard, soft, scalars, *results, rows, BLOCK=SCALAR_BLOCK, num_warps=SCALAR_WARPS)
    loss, hard_mean, soft_mean = results
    return loss, hard_mean, soft_mean


def row_gradients(
    upstream: Tensor, scalars: Tensor, logits: Logits, labels: Labels, statistics: Tensor, out: Tensor
) -> None:
    """Write the gradient of upstream x loss into ``out`` (N, V), which has unit column stride; without biases."""
    student, teacher = logits.student, logits.teacher
    rows, columns = student.shape
    if rows == 0:
        return
    terms = torch.empty(rows, TERMS, dtype=torch.float32, device=student.device)
    launch(
        terms_kernel,
        (triton.cdiv(rows, LOSSES_BLOCK),),
        statistics,
        scalars,
        labels.values,
        upstream,
        terms,
        rows,
        labels.values.stride(0),
        row_stride(upstream),
        labels.ignore_index,
        BLOCK=LOSSES_BLOCK,
        HAS_TEACHER=teacher is not None,
        SOFT_ALL=labels.soft_all,
    )
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(columns))
    width = min(block, common_width(out, student, teacher))
    # Columns by which a row may begin before a block does.
    most_head = 0 if out.stride(0) % width == 0 else width - 1
    launch(
        gradient_kernel,
        (rows, triton.cdiv(most_head + columns, block)),
        out,
        student,
        teacher,
        labels.values,
        terms,
        scalars,
        out.stride(0),
        *student.stride(),
        *strides(teacher),
        labels.values.stride(0),
        labels.ignore_index,
        V=columns,
        BLOCK=block,
        WIDTH=width,
        OUT_ALIGNMENT=alignment(out),
        SOFT_ALL=labels.soft_all,
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
