"""The objective's sums and its gradient on a block of rows, in plain torch: run as it is, or fused by torch.compile.

Legend: n rows, V vocabulary columns, z logits, f = log2(e) / tau; sums as in ``layout.Statistics``. Everything is
fp32 inside and in powers of 2: exp2 is the cheaper function on CPUs and GPUs alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dwt_kernels.layout import KL_SCALE, LOG2_E, NO_RESIDUAL, Logits, Scalars, Statistics


class Exponent(NamedTuple):
    """f = ``factor`` + ``residual``; see ``layout.Scalars``."""

    factor: Tensor
    residual: float | Tensor
    unit_temperature: bool
    """A promise that tau is 1, which saves one exponential in three."""


def block_statistics(buffers: Sequence[Tensor], logits: Logits, labels: Tensor, exponent: Exponent) -> Tensor:
    """``Statistics`` (n, 7), 0 for the teacher's where there is none. ``labels`` (n,) must be columns.

    ``buffers`` are three of (n, V) fp32 to work in.
    """
    student_centred, teacher_centred, exponential = buffers
    student_max = centre(logits.student, logits.student_bias, student_centred)
    label_logit = student_centred.gather(1, labels.unsqueeze(1)).squeeze(1)
    student_sum = torch.mul(student_centred, LOG2_E, out=exponential).exp2_().sum(1)
    zero = torch.zeros_like(student_sum)
    if logits.teacher is None:
        return torch.stack(Statistics(student_max, student_sum, zero, zero, zero, zero, label_logit), 1)
    student_tau_sum = student_sum
    if not exponent.unit_temperature:
        student_tau_sum = power(student_centred, exponent, exponential).sum(1)
    teacher_max = centre(logits.teacher, logits.teacher_bias, teacher_centred)
    weights = power(teacher_centred, exponent, exponential)
    teacher_sum = weights.sum(1)
    # A teacher logit of -inf has weight 0; its share 0 x inf is a NaN that nansum leaves out. A NaN that comes in is
    # still seen: it is in the other sums too.
    kl_sum = weights.mul_(teacher_centred.sub_(student_centred).mul_(KL_SCALE)).nansum(1)
    row = Statistics(student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum, label_logit)
    return torch.stack(row, 1)


class RowFactors(NamedTuple):
    """What a row's exponentials are multiplied by: (N, 1) fp32 each, 0 where the hard loss does not count the row.

    Rounded once, from fp64: an error here would be the same in every column.
    """

    hard: Tensor
    student_soft: Tensor
    teacher_soft: Tensor
    label: Tensor


def row_factors(upstream: Tensor, labelled: Tensor, statistics: Tensor, scalars: Tensor) -> Tensor:
    """``RowFactors`` as (N, 4); ``upstream`` and ``labelled`` are (N,)."""
    named = Scalars(*scalars.unbind())
    hard = (upstream * named.hard_gradient).where(labelled, 0.0)
    soft = upstream * named.soft_gradient
    row = Statistics(*statistics.double().unbind(1))
    factors = RowFactors(hard / row.student_sum, soft / row.student_tau_sum, -soft / row.teacher_sum, -hard)
    return torch.stack(factors, 1).float()


def block_gradient(
    buffers: Sequence[Tensor],
    logits: Logits,
    labels: Tensor | None,
    statistics: Tensor,
    factors: Tensor,
    exponent: Exponent,
) -> Tensor:
    """upstream x (hard_scale (p_s - onehot) + soft_scale (p_s^tau - p_t^tau)): (n, V) fp32.

    ``factors`` (n, 4) are from ``row_factors``, ``labels`` (n,) columns, or None to leave onehot out. ``buffers`` are
    three of (n, V) fp32 to work in; the result is the first. The soft difference is small or exact, onehot the largest
    term, so that this order of additions loses least.
    """
    sums = Statistics(*statistics.unsqueeze(2).unbind(1))
    row = RowFactors(*factors.unsqueeze(2).unbind(1))
    gradient, share, centred = buffers
    if logits.teacher is not None:
        upcast(logits.teacher, logits.teacher_bias, centred).sub_(sums.teacher_max)
        power(centred, exponent, gradient).mul_(row.teacher_soft)
    upcast(logits.student, logits.student_bias, centred).sub_(sums.student_max)
    if logits.teacher is None:
        torch.mul(centred, LOG2_E, out=gradient).exp2_().mul_(row.hard)
    elif exponent.unit_temperature:
        torch.mul(centred, LOG2_E, out=share).exp2_()
        gradient += torch.mul(share, row.student_soft, out=centred)
        gradient += share.mul_(row.hard)
    else:
        gradient += power(centred, exponent, share).mul_(row.student_soft)
        gradient += torch.mul(centred, LOG2_E, out=share).exp2_().mul_(row.hard)
    if labels is not None:
        gradient.scatter_add_(1, labels.unsqueeze(1), row.label)
    return gradient


def upcast(logits: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """fp32 logits, with the bias of the linear head if there is one, written to ``out``."""
    out.copy_(logits)
    return out if bias is None else out.add_(bias)


def centre(logits: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write the logits less their row's maximum to ``out`` (n, V); the maxima (n,)."""
    maximum = upcast(logits, bias, out).amax(1)
    out.sub_(maximum.unsqueeze(1))
    return maximum


def power(centred: Tensor, exponent: Exponent, out: Tensor) -> Tensor:
    """2^(centred f), written to ``out``."""
    torch.mul(centred, exponent.factor, out=out)
    if isinstance(exponent.residual, Tensor):
        out.addcmul_(centred, exponent.residual)
    elif exponent.residual != NO_RESIDUAL:
        out.add_(centred, alpha=exponent.residual)
    return out.exp2_()
