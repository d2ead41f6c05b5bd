"""The linear form in chunks of rows: two products, the row kernel, and the gradients' products, chunk after chunk.

Extra memory at the peak, in bytes, with b those of an element of the hidden states:

    forward     2 b chunk_rows V    logits; the gradient is written over the student's (fp32 block buffers on a CPU)
              + b chunk_rows H_s    the chunk's hidden states without ignored rows
              + 4 V H_s             dW while it is summed, in fp32; 2 V H_s with one chunk in bf16
              + 2 V H_s             on a CPU in bf16 with several chunks: one chunk's share of dW
              + 4 chunk_rows H_s    on a CPU in fp16: the chunk's hidden states in fp32
              + 4 chunk_rows 1,024  likewise, 1,024 columns of its gradient
              + b N H_s             d hidden

When the chunks are done and their logits freed, dW is brought to the dtype and shape it waits in, and for that moment
exists in both: another 2 V H_s for bf16 of several chunks or with padded columns, another 4 V H_s for fp32 and fp16
with padded columns, else nothing. The backward pass holds what waits, the gradients it returns, and with plain torch an
fp32 block of ``on_torch.blocks``.

A product of 16-bit inputs is summed in fp32 inside the matrix multiplication. With one chunk, the result has the dtype
that dW waits in: the single rounding that the gradient needs anyway. With several chunks on a GPU, the result is fp32
and is added to an fp32 total in the multiplication's epilogue. On a CPU, torch can only return it in 16 bits. So in
bf16 each chunk's share is rounded once and added in fp32. In fp16 such a share may be beyond the range, as it is not
divided by the number of rows yet: it is made of fp32 operands, block by block, which on a CPU is also faster.

On a GPU a 16-bit product over a vocabulary that is no multiple of 8, such as BERT's 30,522, is made in two parts, see
``column_parts``. d hidden is then the sum of two products: that of the few columns is rounded by itself, the total
once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dwt_kernels.arguments import backend_module
from dwt_kernels.layout import STATISTICS, Labels, Logits
from dwt_kernels.on_torch.blocks import add_column_sums_in_blocks, add_in_blocks, add_product_in_blocks

# Both logit buffers of a chunk together. They are large, because every chunk reads and writes the fp32 dW (8 V H
# bytes). At Liger's shape (hidden states of 2,048 and 4,096) and 1,408 rows a chunk, that takes 8% of the time of the
# products, at 4.8 TB/s and 700 TFLOP/s; such a chunk is 0.72 GB for V = 128,256 in 16 bits, and one more chunk in 8,192
# rows costs 1.4%. They are no larger, because Liger's loss at 8,192 rows of that vocabulary would then need less memory
# than ours. On a CPU (0.8 TFLOP/s) dW takes 4% at 1,000 rows a chunk, which for V = 30,522 are 122 MB.
GPU_CHUNK_BYTES = 3 << 28
CPU_CHUNK_BYTES = 1 << 29

# Logits of this size fit any GPU, so its free memory is not asked for.
SMALL_BYTES = 1 << 28

# The logits' share of the free memory of a GPU: gradients, and what the backward pass needs, take the rest.
FREE_MEMORY_SHARE = 0.25

# Below this many rows the chunks' products no longer fill a GPU, and recomputing tiles is the better use of it.
SMALLEST_CHUNK_ROWS = 256

# Rows of a tile of a GPU's products: a last one that is not full takes as long.
TILE_ROWS = 128

# Leading dimension of a chunk's logits, in elements: 128 bytes in 16 bits, what a GPU's aligned GEMM tiles need.
ROW_ALIGNMENT = 64

# Columns of 16 bits that cuBLAS's fast kernels want a multiple of, in sizes as in strides. Otherwise it takes kernels
# made for sm_80 with loads of 4 bytes: 244 TFLOP/s on an H200 at V = 30,522, against 790 at V = 128,256.
COLUMN_ALIGNMENT = 8

# From here on the up to 7 columns beyond are under 1% of the product, in time and in what their rounding adds.
LEAST_SPLIT_COLUMNS = 1024


class Head(NamedTuple):
    """logits (N, V) = hidden (N, H) @ weight (V, H).T + bias (V,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def of_rows(self, index: Tensor) -> Head:
        return self._replace(hidden=self.hidden[index])

    def of_columns(self, columns: int) -> Head:
        """Without the padding from ``columns`` on."""
        bias = None if self.bias is None else self.bias[:columns]
        return self._replace(weight=self.weight[:columns], bias=bias)


def chunked_statistics_and_gradients(
    student: Head,
    teacher: Head | None,
    labels: Labels,
    upstream: Tensor,
    scalars: Tensor,
    needed: Sequence[bool],
    chunk_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The rows' statistics (N, 7), and the gradients of student hidden, weight and bias (None where not ``needed``).

    The gradients are those of the sum of upstream x row losses as ``scalars`` scale them; ``upstream`` is 0-d or (N,).
    """
    rows = student.hidden.shape[0]
    module = backend_module(backend)
    need_hidden, need_weight, need_bias = needed
    statistics = [torch.empty(0, STATISTICS, dtype=torch.float32, device=student.hidden.device)]
    d_hidden = student.hidden.new_empty(student.hidden.shape) if need_hidden else None
    d_weight = d_bias = None
    student_buffer = logits_buffer(student, chunk_rows, backend)
    teacher_buffer = None if teacher is None else logits_buffer(teacher, chunk_rows, backend)
    for start in range(0, rows, chunk_rows):
        index = slice(start, min(start + chunk_rows, rows))
        hidden, chunk_labels = student.hidden[index], labels._replace(values=labels.values[index])
        gradient = write_logits(hidden, student.weight, student_buffer[: hidden.shape[0]])
        logits = Logits(gradient, None, student.bias)
        if teacher is not None and teacher_buffer is not None:
            theirs = write_logits(teacher.hidden[index], teacher.weight, teacher_buffer[: hidden.shape[0]])
            logits = logits._replace(teacher=theirs, teacher_bias=teacher.bias)
        if not any(needed):
            statistics.append(module.row_statistics(logits, chunk_labels, scalars))
            continue
        chunk_upstream = upstream[index] if upstream.dim() == 1 else upstream
        statistics.append(module.row_statistics_and_gradients(chunk_upstream, scalars, logits, chunk_labels))
        last = index.stop == rows
        if d_hidden is not None:
            write_hidden_gradient(gradient, student.weight, d_hidden[index])
        if need_weight:
            if not labels.soft_all:
                # An ignored row's gradient is 0, but its hidden state may be NaN, and so would their product be.
                hidden = hidden.masked_fill((chunk_labels.values == labels.ignore_index).unsqueeze(1), 0)
            d_weight = add_product(d_weight, gradient.t(), hidden, last)
        if need_bias:
            d_bias = add_column_sums(d_bias, gradient, last)
    return statistics[-1] if len(statistics) <= 2 else torch.cat(statistics), d_hidden, d_weight, d_bias


def logits_buffer(head: Head, rows: int, backend: str) -> Tensor:
    """(rows, V) in the hidden states' dtype; with an aligned leading dimension, except for torch on a CPU."""
    columns = head.weight.shape[0]
    alignment = 1 if backend == "torch" and head.hidden.device.type == "cpu" else ROW_ALIGNMENT
    padded = -(-columns // alignment) * alignment
    buffer = head.hidden.new_empty(rows, padded)
    if head.hidden.device.type == "cpu":
        # A bf16 product on a CPU with AMX multiplies what lies beside a row by 0: NaN there would spoil d hidden.
        buffer[:, columns:].zero_()
    return buffer[:, :columns]


def column_parts(columns: int, operand: Tensor) -> list[slice]:
    """The vocabulary's columns product by product: all of them, or the aligned ones and the up to 7 that are left over.

    ``operand``: one of the product's, whose device and dtype tell whether two parts are faster than one.
    """
    aligned = columns // COLUMN_ALIGNMENT * COLUMN_ALIGNMENT
    if aligned == columns or columns < LEAST_SPLIT_COLUMNS or not wants_aligned_columns(operand):
        return [slice(0, columns)]
    return [slice(0, aligned), slice(aligned, columns)]


def wants_aligned_columns(operand: Tensor) -> bool:
    return operand.device.type == "cuda" and operand.element_size() == 2


def write_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``out`` (n, V) = hidden (n, H) @ weight (V, H).T"""
    for part in column_parts(weight.shape[0], weight):
        torch.mm(hidden, weight[part].t(), out=out[:, part])
    return out


def write_hidden_gradient(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out`` (n, H) = gradient (n, V) @ weight (V, H)"""
    *main, last = column_parts(weight.shape[0], weight)
    torch.mm(gradient[:, last], weight[last], out=out)
    for part in main:  # to which the few columns' product is added before it is rounded
        out.addmm_(gradient[:, part], weight[part])


def saved_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype a head's gradient waits in for the backward pass: bf16 has fp32's range, fp16 would overflow."""
    return parameter.dtype if parameter.dtype == torch.bfloat16 else torch.float32


def add_product(total: Tensor | None, left: Tensor, right: Tensor, last: bool) -> Tensor:
    """total + left (V, n) @ right (n, H); fp32, or the dtype it waits in when this is the first and ``last`` one.

    That is 16 bits for bf16, rounded once inside the product.
    """
    if left.dtype == torch.float32:
        return torch.mm(left, right) if total is None else total.addmm_(left, right)
    if left.device.type == "cpu" and left.dtype == torch.float16:
        if total is None:
            total = left.new_zeros(left.shape[0], right.shape[1], dtype=torch.float32)
        return add_product_in_blocks(total, left, right)
    if left.device.type == "cpu":
        product = torch.mm(left, right)
        if total is None:
            return product if last else product.float()
        return add_in_blocks(total, product)
    first = total is None
    if total is None:
        dtype = left.dtype if last and left.dtype == torch.bfloat16 else torch.float32
        total = left.new_empty(left.shape[0], right.shape[1], dtype=dtype)
    for part in column_parts(left.shape[0], left):
        write_sum(total[part], left[part], right, first)
    return total


def write_sum(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """``total`` = left @ right, or += where it is not the ``first``; 16-bit operands, summed in fp32."""
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total)
    elif first:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def add_column_sums(total: Tensor | None, gradient: Tensor, last: bool) -> Tensor:
    """total + the sum over the rows of ``gradient`` (n, V); fp64, but as it is where it is the first and ``last``."""
    if gradient.device.type == "cpu" and gradient.dtype == torch.float16:
        sums = add_column_sums_in_blocks(gradient.new_zeros(gradient.shape[1], dtype=torch.float32), gradient)
    elif gradient.device.type == "cpu" and gradient.dtype == torch.bfloat16:
        # A product with ones: torch's own sum over rows takes ten times as long in 16 bits on a CPU.
        sums = torch.mm(gradient.new_ones(1, gradient.shape[0]), gradient).squeeze(0)
    else:
        sums = gradient.sum(0, dtype=torch.float32)
    if total is None:
        return sums if last else sums.double()
    return total.add_(sums)


def resolve_chunk_rows(
    memory: str, chunk_rows: int | None, backend: str, student: Head, teacher: Head | None, with_gradients: bool
) -> int | None:
    """Rows in a chunk, see ``even_chunk_rows``; None for logit-free.

    Depends on the shapes alone, except on a GPU with less than 4 GiB free when it was first asked.
    """
    if memory == "logit_free":
        return None
    rows = student.hidden.shape[0]
    if chunk_rows is not None:
        return even_chunk_rows(rows, chunk_rows)
    element_bytes = sum(head.hidden.element_size() for head in (student, teacher) if head is not None)
    row_bytes = student.weight.shape[0] * element_bytes
    small = rows * row_bytes <= SMALL_BYTES
    most_bytes = SMALL_BYTES if small else chunk_bytes(student.hidden.device, with_gradients)
    may_be_logit_free = memory == "auto" and backend == "triton" and not torch.are_deterministic_algorithms_enabled()
    return automatic_chunk_rows(rows, row_bytes, most_bytes, may_be_logit_free)


def automatic_chunk_rows(rows: int, row_bytes: int, most_bytes: int, may_be_logit_free: bool) -> int | None:
    """Rows in a chunk whose logits take ``most_bytes`` at most, at ``row_bytes`` a row of both models.

    None, where that ``may_be_logit_free``, if chunks would be too small.
    """
    most_rows = max(1, most_bytes // row_bytes)
    if may_be_logit_free and most_rows < min(rows, SMALLEST_CHUNK_ROWS):
        return None
    return even_chunk_rows(rows, most_rows)


def even_chunk_rows(rows: int, most_rows: int) -> int:
    """Rows in a chunk of at most ``most_rows``, all chunks nearly equal; several are of whole tiles where these fit."""
    chunks = max(1, -(-rows // most_rows))
    even = max(1, -(-rows // chunks))
    whole = -(-even // TILE_ROWS) * TILE_ROWS
    return whole if chunks > 1 and whole <= most_rows else even


def chunk_bytes(device: torch.device, with_gradients: bool) -> int:
    """The most bytes of a chunk's logits. A GPU's free memory is asked for once, in training and in evaluation each."""
    if device.type == "cpu":
        return CPU_CHUNK_BYTES
    if (device, with_gradients) not in _chunk_bytes:
        if torch.cuda.is_current_stream_capturing():
            return GPU_CHUNK_BYTES
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        _chunk_bytes[device, with_gradients] = min(GPU_CHUNK_BYTES, int((free + cached) * FREE_MEMORY_SHARE))
    return _chunk_bytes[device, with_gradients]


_chunk_bytes: dict[tuple[torch.device, bool], int] = {}
