"""What operators and kernels exchange, field by field, and the constants of both back ends."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
LOG2_E_FP32 = torch.tensor(LOG2_E, dtype=torch.float32).item()
LN_2 = math.log(2)

# sum w x difference can reach V times the largest KL; scaled down by a power of 2 no vocabulary overflows fp32.
KL_SCALE = 2.0**-20

# A residual below this share of f (a quarter of fp32's rounding) does not matter, and is replaced by NO_RESIDUAL.
LEAST_RESIDUAL = 2.0**-26
NO_RESIDUAL = 2.0**-100


class Logits(NamedTuple):
    """Rows of logits (N, V) of both models; their biases (V,), of the linear form, are still to be added."""

    student: Tensor
    teacher: Tensor | None
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None


class Labels(NamedTuple):
    """The labels (N,) int64 of these rows, and which rows count."""

    values: Tensor
    ignore_index: int
    soft_all: bool
    """The soft loss counts on every row; False without a teacher."""

    @property
    def labelled(self) -> Tensor:
        """(N,) bool."""
        return self.values != self.ignore_index

    def counted(self) -> Tensor | None:
        """Indices of the rows that count, or None for all of them.

        On a GPU it is None: finding them would take a host synchronisation, so that rows are masked there.
        """
        if self.soft_all or self.values.device.type != "cpu":
            return None
        labelled = self.labelled
        return None if bool(labelled.all()) else labelled.nonzero().squeeze(1)


class Statistics(NamedTuple):
    """What a pass over a row keeps of it. In this order the fields are the columns of the statistics (N, 7) fp32.

    With m the maximum of a row's logits z, a = z_s - m_s, b = z_t - m_t and f = log2(e) / tau:

    student_max = m_s, student_sum = sum 2^(a log2(e)), student_tau_sum = sum 2^(a f);
    teacher_max = m_t, teacher_sum = sum 2^(b f), kl_sum = sum 2^(b f) (b - a) x KL_SCALE;
    label_logit = a[label].

    So hard = ln student_sum - label_logit, and
    soft = ln 2 (kl_sum f / teacher_sum / KL_SCALE + log2(student_tau_sum / teacher_sum)).

    Maximum and sum stay apart because adding them would lose the sum for large logits. A probability as a quotient is
    more exact than as the exponential of a difference.
    """

    student_max: Tensor
    student_sum: Tensor
    student_tau_sum: Tensor
    teacher_max: Tensor
    teacher_sum: Tensor
    kl_sum: Tensor
    label_logit: Tensor


STATISTICS = len(Statistics._fields)


class RowTerms(NamedTuple):
    """What the gradient of a row needs besides its logits, upstream gradient included; in this order (N, 6) fp32.

    With the names of ``Statistics`` and the scales of ``Scalars``: hard = upstream hard_gradient / student_sum,
    student_soft = upstream soft_gradient / student_tau_sum, teacher_soft = upstream soft_gradient / teacher_sum,
    label = upstream hard_gradient, what is subtracted in the label's column. hard and label are 0 without a label.
    """

    student_max: Tensor
    teacher_max: Tensor
    hard: Tensor
    student_soft: Tensor
    teacher_soft: Tensor
    label: Tensor


TERMS = len(RowTerms._fields)


class Scalars(NamedTuple):
    """What is the same for every row: 0-d fp64 tensors. In this order they are the scalars (8,) fp64.

    mean: from summed rows to the reported hard and soft loss; loss: the same times the weights; gradient: from a row's
    p - onehot and p_s^tau - p_t^tau to the gradient. factor + residual = f = log2(e) / tau, factor being f in fp32,
    rounded down: f in fp32 alone would shift the KL of every row the same way, by up to 1e-7 of it. The residual is
    never 0, so that its product with a centred logit of -inf is -inf and no NaN; where it would not matter, as at
    tau = 1, it is NO_RESIDUAL.
    """

    hard_mean: Tensor
    soft_mean: Tensor
    hard_loss: Tensor
    soft_loss: Tensor
    hard_gradient: Tensor
    soft_gradient: Tensor
    factor: Tensor
    residual: Tensor


SCALARS = len(Scalars._fields)
