"""The linear form in chunks of rows: two products, the row kernel, and the gradients' products, chunk after chunk.

Extra memory at the peak: two logit buffers (chunk_rows, V) in the hidden states' dtype (the gradient is written over
the student's), the gradients that are returned, and dW and db in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwt_kernels.arguments import Objective
from dwt_kernels.backends import backend_module
from dwt_kernels.head_gradients import add_column_sums, add_product

# Leading dimension of a chunk's logits on a GPU, in elements: 128 bytes in 16 bit, what aligned GEMM tiles need.
ROW_ALIGNMENT = 64


def chunked_losses_and_gradients(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    upstream: Tensor,
    scales: Tensor,
    chunk_rows: int,
    needed: list[bool],
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """hard (N,), soft (N,), and the gradients of student hidden, weight and bias (None where not ``needed``).

    The gradient is that of the sum of upstream x (scales[0] x hard + scales[1] x soft); ``upstream`` is 0-d or (N,),
    ``scales`` (2,).
    """
    rows, columns = student_hidden.shape[0], student_weight.shape[0]
    backend = backend_module(objective.backend)
    need_hidden, need_weight, need_bias = needed
    hard, soft = (labels.new_zeros(rows, dtype=torch.float32) for _ in range(2))
    d_hidden = (
        torch.empty(student_hidden.shape, dtype=student_hidden.dtype, device=labels.device) if need_hidden else None
    )
    d_weight = d_bias = None
    student_buffer = logits_buffer(student_hidden, chunk_rows, columns)
    teacher_buffer = None if teacher_hidden is None else logits_buffer(teacher_hidden, chunk_rows, columns)
    for start in range(0, rows, chunk_rows):
        index = slice(start, min(start + chunk_rows, rows))
        hidden = student_hidden[index]
        student = torch.mm(hidden, student_weight.t(), out=student_buffer[: hidden.shape[0]])
        teacher = None
        if teacher_hidden is not None:
            assert teacher_weight is not None and teacher_buffer is not None
            teacher = torch.mm(teacher_hidden[index], teacher_weight.t(), out=teacher_buffer[: hidden.shape[0]])
        row_inputs = (student, student_bias, teacher, teacher_bias, labels[index], objective.temperature)
        counting = (objective.ignore_index, objective.soft_all)
        if not any(needed):
            hard[index], soft[index], _ = backend.row_losses(*row_inputs, *counting)
            continue
        chunk_upstream = upstream[index] if upstream.dim() == 1 else upstream
        hard[index], soft[index] = backend.row_losses_and_gradients(chunk_upstream, scales, *row_inputs, *counting)
        gradient = student
        if d_hidden is not None:
            torch.mm(gradient, student_weight, out=d_hidden[index])
        if need_weight:
            d_weight = add_product(d_weight, gradient.t(), hidden, last=index.stop == rows)
        if need_bias:
            d_bias = add_column_sums(d_bias, gradient)
    return hard, soft, d_hidden, d_weight, d_bias


def logits_buffer(hidden: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) in the hidden states' dtype; on a GPU with an aligned leading dimension."""
    alignment = 1 if hidden.device.type == "cpu" else ROW_ALIGNMENT
    padded = -(-columns // alignment) * alignment
    return torch.empty(rows, padded, dtype=hidden.dtype, device=hidden.device)[:, :columns]
