"""The objective and its gradient on a block of rows, in plain torch: run as it is, or fused by torch.compile.

Legend: n rows, V vocabulary columns. Everything is fp32 inside and in powers of 2: exp2 is the cheaper function on
CPUs and GPUs alike, so logits are multiplied by log2(e) and sums are kept as log2.

A row's statistics (n, 5) are: the student's maximum m_s, log2 sum exp(z_s - m_s), log2 sum exp((z_s - m_s) / tau),
the teacher's maximum m_t and log2 sum exp((z_t - m_t) / tau). Maximum and log2 sum stay apart because adding them
would lose the sum for large logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STATISTICS = 5
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

# sum w x difference can reach V times the largest KL; scaled down by a power of 2 no vocabulary overflows fp32.
KL_SCALE = 2.0**-20


def block_losses(
    student: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    labelled: Tensor,
    temperature: Tensor,
    unit_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """hard (n,), soft (n,) and statistics (n, 5); hard is 0 on rows that are not ``labelled``.

    ``unit_temperature`` promises that ``temperature`` is 1 and saves one exponential in three.
    """
    student_max, centred = centre(student, student_bias)
    label_logit = centred.gather(1, labels.where(labelled, 0).unsqueeze(1)).squeeze(1)
    scaled = centred * LOG2_E
    log2_sum = scaled.exp2().sum(1).log2()
    hard = (log2_sum * LN_2 - label_logit).where(labelled, 0.0)
    zero = torch.zeros_like(hard)
    if teacher is None:
        return hard, zero, torch.stack([student_max.squeeze(1), log2_sum, zero, zero, zero], 1)
    student_log2_sum = log2_sum
    factor = LOG2_E / temperature
    if not unit_temperature:
        scaled = centred.mul_(factor)
        student_log2_sum = scaled.exp2().sum(1).log2()
    teacher_max, teacher_scaled = centre(teacher, teacher_bias)
    teacher_scaled *= factor
    weights = teacher_scaled.exp2()
    weight_sum = weights.sum(1)
    # A teacher logit of -inf has weight 0; its share 0 x inf is a NaN that nansum leaves out. A NaN that comes in is
    # still seen: it is in the other sums too.
    shares = weights.mul_(teacher_scaled.sub_(scaled).mul_(KL_SCALE)).nansum(1)
    teacher_log2_sum = weight_sum.log2()
    soft = (shares / weight_sum * (1 / KL_SCALE) + student_log2_sum - teacher_log2_sum) * LN_2
    # KL >= 0: what rounding leaves below zero is an error of the sum and nothing else. NaN stays NaN.
    statistics = [student_max.squeeze(1), log2_sum, student_log2_sum, teacher_max.squeeze(1), teacher_log2_sum]
    return hard, soft.clamp(min=0), torch.stack(statistics, 1)


def block_gradient(
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
    unit_temperature: bool,
) -> Tensor:
    """upstream x (scales[0] (p_s - onehot) + scales[1] / tau (p_s^tau - p_t^tau)): (n, V) fp32; ``upstream`` (n,)."""
    student_max, log2_sum, student_log2_sum, teacher_max, teacher_log2_sum = statistics.unsqueeze(2).unbind(1)
    hard_scale = (upstream * scales[0]).where(labelled, 0.0).unsqueeze(1)
    centred = upcast(student, student_bias) - student_max
    gradient = (centred * LOG2_E).sub_(log2_sum).exp2_()
    if teacher is None:
        gradient *= hard_scale
    else:
        soft_scale = (upstream * scales[1] / temperature).unsqueeze(1)
        factor = LOG2_E / temperature
        if unit_temperature:
            gradient *= hard_scale + soft_scale
        else:
            gradient *= hard_scale
            gradient += centred.mul_(factor).sub_(student_log2_sum).exp2_().mul_(soft_scale)
        teacher_scaled = (upcast(teacher, teacher_bias) - teacher_max).mul_(factor)
        gradient -= teacher_scaled.sub_(teacher_log2_sum).exp2_().mul_(soft_scale)
    return gradient.scatter_add_(1, labels.where(labelled, 0).unsqueeze(1), -hard_scale)


def upcast(logits: Tensor, bias: Tensor | None) -> Tensor:
    """fp32, with the bias of the linear head if there is one; may be ``logits`` itself."""
    return logits.float() if bias is None else logits.float() + bias.float()


def centre(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows' maxima (n, 1) and the logits less them (n, V), in new memory."""
    logits = upcast(logits, bias)
    maximum = logits.amax(1, keepdim=True)
    return maximum, logits - maximum
