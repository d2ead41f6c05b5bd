"""The objective's sums and its gradient on a block of rows, in plain torch: run as it is, or fused by torch.compile.

Legend: n rows, V vocabulary columns, z logits, m maxima, f = log2(e) / tau. Everything is fp32 inside and in powers of
2: exp2 is the cheaper function on CPUs and GPUs alike.

A row's statistics (n, 7) are, with a = z_s - m_s and b = z_t - m_t,
    m_s, S_1 = sum 2^(a log2(e)), S = sum 2^(a f), m_t, W = sum 2^(b f), K = sum 2^(b f) (b - a) x KL_SCALE, a[label],
from which hard = ln S_1 - a[label] and soft = ln 2 (K f / W / KL_SCALE + log2(S / W)). Maximum and sum stay apart
because adding them would lose the sum for large logits; a probability as a quotient is more exact than as the
exponential of a difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwt_kernels.scalars import KL_SCALE, LOG2_E

STATISTICS = 7


def block_statistics(
    buffers: Sequence[Tensor],
    student: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    factor: Tensor,
    residual: float | Tensor,
    unit_temperature: bool,
) -> Tensor:
    """Statistics (n, 7), 0 for the teacher's where there is none. ``labels`` (n,) must be columns.

    ``factor`` + ``residual`` is f. ``unit_temperature`` promises that tau is 1 and saves one exponential in three.
    ``buffers`` are three of (n, V) fp32 to work in.
    """
    student_centred, teacher_centred, exponential = buffers
    student_max = centre(student, student_bias, student_centred)
    label_logit = student_centred.gather(1, labels.unsqueeze(1)).squeeze(1)
    student_sum = torch.mul(student_centred, LOG2_E, out=exponential).exp2_().sum(1)
    zero = torch.zeros_like(student_sum)
    if teacher is None:
        return torch.stack([student_max, student_sum, zero, zero, zero, zero, label_logit], 1)
    tau_sum = student_sum
    if not unit_temperature:
        tau_sum = power(student_centred, factor, residual, exponential).sum(1)
    teacher_max = centre(teacher, teacher_bias, teacher_centred)
    weights = power(teacher_centred, factor, residual, exponential)
    weight_sum = weights.sum(1)
    # A teacher logit of -inf has weight 0; its share 0 x inf is a NaN that nansum leaves out. A NaN that comes in is
    # still seen: it is in the other sums too.
    shares = weights.mul_(teacher_centred.sub_(student_centred).mul_(KL_SCALE)).nansum(1)
    return torch.stack([student_max, student_sum, tau_sum, teacher_max, weight_sum, shares, label_logit], 1)


def block_gradient(
    buffers: Sequence[Tensor],
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labelled: Tensor,
    statistics: Tensor,
    hard_scale: Tensor,
    soft_scale: Tensor,
    factor: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    unit_temperature: bool,
) -> Tensor:
    """upstream x (hard_scale p_s + soft_scale (p_s^tau - p_t^tau)): (n, V) fp32, without the label's share.

    ``upstream`` is (n,), the scales 0-d fp32. The label's share is the caller's to add (``label_share``). ``buffers``
    are two of (n, V) fp32 to work in; the result is the first.
    """
    student_max, student_sum, tau_sum, teacher_max, weight_sum, _, _ = statistics.unsqueeze(2).unbind(1)
    row_hard_scale = (upstream * hard_scale).where(labelled, 0.0).unsqueeze(1)
    gradient, scaled = buffers
    upcast(student, student_bias, scaled).sub_(student_max)
    torch.mul(scaled, LOG2_E, out=gradient).exp2_()
    if teacher is None:
        return gradient.mul_(row_hard_scale / student_sum)
    row_soft_scale = (upstream * soft_scale).unsqueeze(1)
    if unit_temperature:
        gradient *= (row_hard_scale + row_soft_scale) / student_sum
    else:
        gradient *= row_hard_scale / student_sum
        gradient += scaled.mul_(factor).exp2_().mul_(row_soft_scale / tau_sum)
    upcast(teacher, teacher_bias, scaled).sub_(teacher_max)
    gradient -= scaled.mul_(factor).exp2_().mul_(row_soft_scale / weight_sum)
    return gradient


def label_share(upstream: Tensor, labels: Tensor, labelled: Tensor, hard_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The labels' columns (n, 1), 0 where there is none, and - upstream x hard_scale (n, 1), 0 likewise."""
    return labels.where(labelled, 0).unsqueeze(1), -(upstream * hard_scale).where(labelled, 0.0).unsqueeze(1)


def upcast(logits: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """fp32 logits, with the bias of the linear head if there is one, written to ``out``."""
    out.copy_(logits)
    return out if bias is None else out.add_(bias)


def centre(logits: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write the logits less their row's maximum to ``out`` (n, V); the maxima (n,)."""
    maximum = upcast(logits, bias, out).amax(1)
    out.sub_(maximum.unsqueeze(1))
    return maximum


def power(centred: Tensor, factor: Tensor, residual: float | Tensor, out: Tensor) -> Tensor:
    """2^(centred (factor + residual)), written to ``out``."""
    torch.mul(centred, factor, out=out)
    if isinstance(residual, Tensor):
        out.addcmul_(centred, residual)
    elif residual != 0:
        out.add_(centred, alpha=residual)
    return out.exp2_()
