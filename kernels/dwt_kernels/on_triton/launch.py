"""How kernels are started: on their tensors' GPU, and how a row's columns are distributed over threads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

# Columns of either model that a thread holds at a time, and warps that share a row in the statistics kernel. It then
# takes under 80 registers, so that three or more programs fit a multiprocessor. With a whole row of 32k columns at
# once, only one program of 32 warps would fit.
COLUMNS_PER_THREAD = 16
ROW_WARPS = 8
THREADS_PER_WARP = 64 if torch.version.hip else 32
LOAD_BYTES = 16


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[programs](*arguments, **constants)`` on the GPU of the first argument, a tensor; on a CPU as it is.

    Triton starts a kernel on the current device, which need not be that of the tensors: they may be on cuda:1 while
    cuda:0 is current. Changing it does not synchronise, and is allowed while a CUDA graph is captured.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[programs](*arguments, **constants)


class Tile(NamedTuple):
    """Columns of a row at a time: each of ``lanes`` threads loads ``width`` neighbours ``steps`` times.

    Such blocks begin at place ``first`` (see ``steps``), which every row has, and have ``whole`` columns together. The
    others of a row are one block of ``tail_width`` neighbours ``tail_steps`` times. ``alignment`` (a power of two)
    divides the rows' offsets.
    """

    first: int
    whole: int
    steps: int
    lanes: int
    width: int
    tail_steps: int
    tail_width: int
    alignment: int

    @property
    def num_warps(self) -> int:
        return max(1, self.lanes // THREADS_PER_WARP)


def row_tile(student: Tensor, teacher: Tensor | None) -> Tile:
    columns = student.shape[1]
    room = next_power_of_2(columns)
    # A matrix that begins within 16 bytes is loaded by the element. With more neighbours in a thread, Triton would load
    # them for other threads, which would wait for one another in every block.
    aligned = all(each is None or each.data_ptr() % LOAD_BYTES == 0 for each in (student, teacher))
    # Below the number of columns, if that is not 1: place ``first`` is in every row.
    width = min(common_width(student, teacher) if aligned else 1, max(1, room // 2))
    lanes = min(ROW_WARPS * THREADS_PER_WARP, max(1, room // COLUMNS_PER_THREAD))
    steps = min(COLUMNS_PER_THREAD // width, max(1, room // (lanes * width)))
    first = 0 if student.stride(0) % width == 0 else width
    block = steps * lanes * width
    whole = (columns - first) // block * block
    # The tail goes around from the row's end to its beginning, where only this many neighbours stay neighbours.
    tail_width = min(width, alignment(student))
    tail_steps = next_power_of_2(max(1, cdiv(columns - whole, lanes * tail_width)))
    return Tile(first, whole, steps, lanes, width, tail_steps, tail_width, alignment(student))


def common_width(*matrices: Tensor | None) -> int:
    """Columns in a load or store, where all rows are at the same distance from such a multiple: at most 16 bytes."""
    given = [each for each in matrices if each is not None]
    if any(each.stride(1) != 1 for each in given):
        return 1
    width = min(LOAD_BYTES // each.element_size() for each in given)
    while any((each.stride(0) - given[0].stride(0)) % width for each in given):
        width //= 2
    return width


def contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def strides(teacher: Tensor | None) -> tuple[int, ...]:
    return (0, 1) if teacher is None else teacher.stride()


def row_stride(upstream: Tensor | None) -> int:
    return 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)


def alignment(matrix: Tensor) -> int:
    """The largest power of two up to 16 that divides the offset of every row, in elements."""
    stride = matrix.stride(0)
    return 16 if stride == 0 else min(16, stride & -stride)
