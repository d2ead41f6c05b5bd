"""The linear form in chunks of rows: two products, the row kernel, and the gradients' products, chunk after chunk.

Extra memory at the peak, in bytes, with b those of an element of the hidden states:

    forward     2 b chunk_rows V    logits; the gradient is written over the student's (fp32 block buffers on a CPU)
              + b chunk_rows H_s    the chunk's hidden states without ignored rows
              + 4 V H_s             dW while it is summed, in fp32
              + b V H_s             on a CPU in 16 bits with several chunks: one chunk's share of dW
              + b N H_s             d hidden

When the chunks are done and their logits freed, dW is brought to the dtype and shape it waits in, and for that moment
exists in both: another 2 V H_s for bf16, another 4 V H_s for fp32 with padded columns, else nothing. The backward pass
holds what waits, the gradients it returns, and with plain torch an fp32 block of ``head_gradients.GPU_BLOCK_ELEMENTS``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwt_kernels.arguments import Objective
from dwt_kernels.backends import backend_module
from dwt_kernels.head import Head
from dwt_kernels.head_gradients import add_column_sums, add_product
from dwt_kernels.row_formulas import STATISTICS

# Leading dimension of a chunk's logits on a GPU, in elements: 128 bytes in 16 bits, what aligned GEMM tiles need.
ROW_ALIGNMENT = 64


def chunked_statistics_and_gradients(
    student: Head,
    teacher: Head | None,
    labels: Tensor,
    upstream: Tensor,
    scalars: Tensor,
    chunk_rows: int,
    needed: Sequence[bool],
    objective: Objective,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The rows' statistics (N, 7), and the gradients of student hidden, weight and bias (None where not ``needed``).

    The gradients are those of the sum of upstream x row losses as ``scalars`` scale them; ``upstream`` is 0-d or (N,).
    """
    rows = student.hidden.shape[0]
    backend = backend_module(objective.backend)
    need_hidden, need_weight, need_bias = needed
    statistics = torch.empty(rows, STATISTICS, dtype=torch.float32, device=labels.device)
    d_hidden = student.hidden.new_empty(student.hidden.shape) if need_hidden else None
    d_weight = d_bias = None
    student_buffer = logits_buffer(student, chunk_rows)
    teacher_buffer = None if teacher is None else logits_buffer(teacher, chunk_rows)
    for start in range(0, rows, chunk_rows):
        index = slice(start, min(start + chunk_rows, rows))
        hidden = student.hidden[index]
        student_logits = torch.mm(hidden, student.weight.t(), out=student_buffer[: hidden.shape[0]])
        teacher_logits = teacher_bias = None
        if teacher is not None and teacher_buffer is not None:
            teacher_bias = teacher.bias
            teacher_logits = torch.mm(teacher.hidden[index], teacher.weight.t(), out=teacher_buffer[: hidden.shape[0]])
        row_inputs = (student_logits, student.bias, teacher_logits, teacher_bias, labels[index])
        counting = (objective.ignore_index, objective.soft_all)
        if not any(needed):
            statistics[index] = backend.row_statistics(*row_inputs, scalars, *counting)
            continue
        chunk_upstream = upstream[index] if upstream.dim() == 1 else upstream
        statistics[index] = backend.row_statistics_and_gradients(chunk_upstream, scalars, *row_inputs, *counting)
        gradient = student_logits
        if d_hidden is not None:
            torch.mm(gradient, student.weight, out=d_hidden[index])
        if need_weight:
            if not (objective.soft_all and teacher is not None):
                # An ignored row's gradient is 0, but its hidden state may be NaN, and so would their product be.
                hidden = hidden.masked_fill((labels[index] == objective.ignore_index).unsqueeze(1), 0)
            d_weight = add_product(d_weight, gradient.t(), hidden, last=index.stop == rows)
        if need_bias:
            d_bias = add_column_sums(d_bias, gradient)
    return statistics, d_hidden, d_weight, d_bias


def logits_buffer(head: Head, rows: int) -> Tensor:
    """(rows, V) in the hidden states' dtype; on a GPU with an aligned leading dimension."""
    columns = head.weight.shape[0]
    alignment = 1 if head.hidden.device.type == "cpu" else ROW_ALIGNMENT
    padded = -(-columns // alignment) * alignment
    return head.hidden.new_empty(rows, padded)[:, :columns]
