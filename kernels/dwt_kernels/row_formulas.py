"""The objective and its gradient on a block of rows, in plain torch: run as it is, or fused by torch.compile.

Legend: n rows, V vocabulary columns. Everything is fp32 inside and in powers of 2: exp2 is the cheaper function on
CPUs and GPUs alike, so logits are multiplied by log2(e) and sums are kept as log2.

A row's statistics (n, 5) are: the student's maximum m_s, log2 sum exp(z_s - m_s), log2 sum exp((z_s - m_s) / tau),
the teacher's maximum m_t and log2 sum exp((z_t - m_t) / tau). Maximum and log2 sum stay apart because adding them
would lose the sum for large logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STATISTICS = 5
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

# sum w x difference can reach V times the largest KL; scaled down by a power of 2 no vocabulary overflows fp32.
KL_SCALE = 2.0**-20


def block_losses(
    buffers: Sequence[Tensor],
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

    ``unit_temperature`` promises that ``temperature`` is 1 and saves one exponential in three. ``buffers`` are three
    of (n, V) fp32 to work in.
    """
    scaled, exponential, weights = buffers
    student_max = centre(student, student_bias, scaled)
    label_logit = scaled.gather(1, labels.where(labelled, 0).unsqueeze(1)).squeeze(1)
    student_sum = torch.mul(scaled, LOG2_E, out=exponential).exp2_().sum(1)
    hard = (student_sum.log() - label_logit).where(labelled, 0.0)
    zero = torch.zeros_like(hard)
    if teacher is None:
        return hard, zero, torch.stack([student_max, student_sum.log2(), zero, zero, zero], 1)
    factor = LOG2_E / temperature
    scaled *= factor
    tau_sum = student_sum if unit_temperature else torch.exp2(scaled, out=exponential).sum(1)
    teacher_scaled = exponential
    teacher_max = centre(teacher, teacher_bias, teacher_scaled)
    teacher_scaled *= factor
    weight_sum = torch.exp2(teacher_scaled, out=weights).sum(1)
    # A teacher logit of -inf has weight 0; its share 0 x inf is a NaN that nansum leaves out. A NaN that comes in is
    # still seen: it is in the other sums too.
    shares = weights.mul_(teacher_scaled.sub_(scaled).mul_(KL_SCALE)).nansum(1)
    # The log of the ratio, not the difference of the logs: each of those is rounded at ten times its size.
    soft = shares / weight_sum * (LN_2 / KL_SCALE) + (tau_sum / weight_sum).log()
    statistics = torch.stack([student_max, student_sum.log2(), tau_sum.log2(), teacher_max, weight_sum.log2()], 1)
    # KL >= 0: what rounding leaves below zero is an error of the sum and nothing else. NaN stays NaN.
    return hard, soft.clamp(min=0), statistics


def block_gradient(
    buffers: Sequence[Tensor],
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labelled: Tensor,
    statistics: Tensor,
    scales: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    temperature: Tensor,
    unit_temperature: bool,
) -> Tensor:
    """upstream x (scales[0] p_s + scales[1] / tau (p_s^tau - p_t^tau)): (n, V) fp32, without the label's share.

    ``upstream`` is (n,). The label's share is the caller's to add (``label_share``). ``buffers`` are two of (n, V) fp32
    to work in; the result is the first.
    """
    student_max, log2_sum, student_log2_sum, teacher_max, teacher_log2_sum = statistics.unsqueeze(2).unbind(1)
    hard_scale = (upstream * scales[0]).where(labelled, 0.0).unsqueeze(1)
    gradient, scaled = buffers
    upcast(student, student_bias, scaled).sub_(student_max)
    torch.mul(scaled, LOG2_E, out=gradient).sub_(log2_sum).exp2_()
    if teacher is None:
        return gradient.mul_(hard_scale)
    soft_scale = (upstream * scales[1] / temperature).unsqueeze(1)
    factor = LOG2_E / temperature
    if unit_temperature:
        gradient *= hard_scale + soft_scale
    else:
        gradient *= hard_scale
        gradient += scaled.mul_(factor).sub_(student_log2_sum).exp2_().mul_(soft_scale)
    upcast(teacher, teacher_bias, scaled).sub_(teacher_max)
    gradient -= scaled.mul_(factor).sub_(teacher_log2_sum).exp2_().mul_(soft_scale)
    return gradient


def label_share(upstream: Tensor, labels: Tensor, labelled: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The labels' columns (n, 1), 0 where there is none, and - upstream x scales[0] (n, 1), 0 likewise."""
    return labels.where(labelled, 0).unsqueeze(1), -(upstream * scales[0]).where(labelled, 0.0).unsqueeze(1)


def upcast(logits: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """fp32 logits, with the bias of the linear head if there is one, written to ``out``."""
    out.copy_(logits)
    return out if bias is None else out.add_(bias)


def centre(logits: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write the logits less their row's maximum to ``out`` (n, V); the maxima (n,)."""
    maximum = upcast(logits, bias, out).amax(1)
    out.sub_(maximum.unsqueeze(1))
    return maximum
