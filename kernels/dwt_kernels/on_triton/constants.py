"""``layout`` for kernels, which can only read global values that are ``tl.constexpr``."""

from __future__ import annotations

import triton
import triton.language as tl

from dwt_kernels import layout
from dwt_kernels.layout import RowTerms, Scalars, Statistics

LOG2_E = tl.constexpr(layout.LOG2_E)
LN_2 = tl.constexpr(layout.LN_2)
KL_SCALE = tl.constexpr(layout.KL_SCALE)
LEAST_RESIDUAL = tl.constexpr(layout.LEAST_RESIDUAL)
NO_RESIDUAL = tl.constexpr(layout.NO_RESIDUAL)
MINUS_INF = tl.constexpr(float("-inf"))

# TRITON_INTERPRET=1 was set when Triton was imported: kernels run in Python, on any device, for tests.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def position(field: str, fields: tuple[str, ...]) -> tl.constexpr:
    return tl.constexpr(fields.index(field))


# Positions in a row's statistics, and how many there are.
STUDENT_MAX = position("student_max", Statistics._fields)
STUDENT_SUM = position("student_sum", Statistics._fields)
STUDENT_TAU_SUM = position("student_tau_sum", Statistics._fields)
TEACHER_MAX = position("teacher_max", Statistics._fields)
TEACHER_SUM = position("teacher_sum", Statistics._fields)
KL_SUM = position("kl_sum", Statistics._fields)
LABEL_LOGIT = position("label_logit", Statistics._fields)
STATISTICS = tl.constexpr(layout.STATISTICS)

# Positions in a row's terms, and how many there are.
STUDENT_MAX_TERM = position("student_max", RowTerms._fields)
TEACHER_MAX_TERM = position("teacher_max", RowTerms._fields)
HARD_TERM = position("hard", RowTerms._fields)
STUDENT_SOFT_TERM = position("student_soft", RowTerms._fields)
TEACHER_SOFT_TERM = position("teacher_soft", RowTerms._fields)
LABEL_TERM = position("label", RowTerms._fields)
TERMS = tl.constexpr(layout.TERMS)

# Positions in the scalars.
HARD_MEAN = position("hard_mean", Scalars._fields)
SOFT_MEAN = position("soft_mean", Scalars._fields)
HARD_LOSS = position("hard_loss", Scalars._fields)
SOFT_LOSS = position("soft_loss", Scalars._fields)
HARD_GRADIENT = position("hard_gradient", Scalars._fields)
SOFT_GRADIENT = position("soft_gradient", Scalars._fields)
FACTOR = position("factor", Scalars._fields)
RESIDUAL = position("residual", Scalars._fields)
