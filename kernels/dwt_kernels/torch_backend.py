"""The row computations on plain torch: the CPU's path, and the GPU's where there is no Triton.

Legend: N rows, V vocabulary columns; z logits; statistics are (N, 5) fp32:
student maximum, log sum exp(z_s - max) at temperature 1 and at tau, teacher maximum, its log sum at tau.
The maximum and the log of the sum are kept apart because their sum loses the log for large logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

STATISTICS = 5

# Eager operations run over a block of rows that stays in the L2 cache of a core: elements of one fp32 temporary.
BLOCK_ELEMENTS = 1 << 17


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
    for index in counted_blocks(student, labelled, soft_all and teacher is not None):
        block_hard, block_soft, block_statistics = losses_of_block(
            student[index],
            student_bias,
            None if teacher is None else teacher[index],
            teacher_bias,
            labels[index],
            labelled[index],
            temperature,
        )
        hard[index], soft[index], statistics[index] = block_hard, block_soft, block_statistics
    return hard, soft, statistics


def row_gradients(
    upstream: Tensor,
    scales: Tensor,
    student: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    statistics: Tensor,
    ignore_index: int,
    soft_all: bool,
    out: Tensor,
) -> None:
    """Write d loss / d student logits into ``out`` (N, V), which may be ``student`` itself.

    ``upstream`` is 0-d or (N,), ``scales`` (2,) multiplies the hard and the soft part.
    """
    labelled = labels != ignore_index
    upstream = upstream.float().expand(labels.shape)
    soft_counts = soft_all and teacher is not None
    if not soft_counts:
        out[~labelled] = 0
    for index in counted_blocks(student, labelled, soft_counts):
        out[index] = gradient_of_block(
            upstream[index],
            scales,
            student[index],
            student_bias,
            None if teacher is None else teacher[index],
            teacher_bias,
            labels[index],
            labelled[index],
            temperature,
            statistics[index],
        ).to(out.dtype)


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
    inputs = (student, student_bias, teacher, teacher_bias, labels, temperature)
    hard, soft, statistics = row_losses(*inputs, ignore_index, soft_all)
    row_gradients(upstream, scales, *inputs, statistics, ignore_index, soft_all, student)
    return hard, soft


def counted_blocks(student: Tensor, labelled: Tensor, every_row: bool) -> list[slice | Tensor]:
    """Blocks of the rows that count, as slices where they are neighbours.

    On a GPU the rows to skip are computed and masked instead: to know them would need a host synchronisation.
    """
    rows, columns = student.shape
    step = max(1, BLOCK_ELEMENTS // columns)
    if every_row or student.device.type != "cpu" or bool(labelled.all()):
        return [slice(start, start + step) for start in range(0, rows, step)]
    return list(labelled.nonzero().squeeze(1).split(step)) if bool(labelled.any()) else []


def losses_of_block(
    student: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    labelled: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and statistics of a few rows, in fp32 whatever comes in."""
    student = student.float() if student_bias is None else student.float() + student_bias.float()
    student_max = student.amax(1, keepdim=True)
    centred = student - student_max
    log_sum = centred.exp().sum(1).log()
    label_logit = centred.gather(1, labels.where(labelled, 0).unsqueeze(1)).squeeze(1)
    hard = (log_sum - label_logit).where(labelled, 0.0)
    zero = torch.zeros_like(hard)
    if teacher is None:
        return hard, zero, torch.stack([student_max.squeeze(1), log_sum, zero, zero, zero], 1)
    student_tau = centred / temperature
    student_log_sum = student_tau.exp().sum(1).log()
    teacher = teacher.float() if teacher_bias is None else teacher.float() + teacher_bias.float()
    teacher_max = teacher.amax(1, keepdim=True)
    teacher_tau = (teacher - teacher_max) / temperature
    weights = teacher_tau.exp()
    weight_sum = weights.sum(1, keepdim=True)
    # A teacher logit of -inf has weight 0 and no share in the sum, where 0 x inf would be NaN.
    shares = torch.where(weights > 0, weights / weight_sum * (teacher_tau - student_tau), 0.0)
    teacher_log_sum = weight_sum.squeeze(1).log()
    # KL >= 0: what rounding leaves below zero is an error of the sum and nothing else.  NaN stays NaN.
    soft = (shares.sum(1) + student_log_sum - teacher_log_sum).clamp(min=0)
    return (
        hard,
        soft,
        torch.stack([student_max.squeeze(1), log_sum, student_log_sum, teacher_max.squeeze(1), teacher_log_sum], 1),
    )


def gradient_of_block(
    upstream: Tensor,
    scales: Tensor,
    student: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    labelled: Tensor,
    temperature: Tensor,
    statistics: Tensor,
) -> Tensor:
    """hard scale x (p_s - onehot) + soft scale / tau x (p_s^tau - p_t^tau), times upstream; (rows, V) fp32."""
    student_max, log_sum, student_log_sum, teacher_max, teacher_log_sum = statistics.unsqueeze(2).unbind(1)
    hard_scale = (upstream * scales[0]).where(labelled, 0.0).unsqueeze(1)
    student = student.float() if student_bias is None else student.float() + student_bias.float()
    centred = student - student_max
    gradient = hard_scale * (centred - log_sum).exp()
    gradient.scatter_add_(1, labels.where(labelled, 0).unsqueeze(1), -hard_scale)
    if teacher is None:
        return gradient
    soft_scale = (upstream * scales[1] / temperature).unsqueeze(1)
    teacher = teacher.float() if teacher_bias is None else teacher.float() + teacher_bias.float()
    difference = (centred / temperature - student_log_sum).exp() - (
        (teacher - teacher_max) / temperature - teacher_log_sum
    ).exp()
    return gradient + soft_scale * difference
