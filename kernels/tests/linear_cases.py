"""Heads for the tests of the linear form, and losses with their gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from dwt_kernels.reference import reference_distill_loss
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Enough to average the luck of rounding out, but for the interpreter, which takes its time.
DEFAULT_ROWS, DEFAULT_COLUMNS = (2000 if torch.cuda.is_available() else 600), 2000
if os.environ.get("TRITON_INTERPRET") == "1":
    DEFAULT_ROWS, DEFAULT_COLUMNS = 12, 90


class Heads(NamedTuple):
    student: list[Tensor | None]
    teacher: list[Tensor | None]
    labels: Tensor


def make_heads(
    device: str,
    rows: int = DEFAULT_ROWS,
    columns: int = DEFAULT_COLUMNS,
    widths: tuple[int, int] = (24, 40),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    ignored: bool = False,
    seed: int = 0,
) -> Heads:
    """Student (N, H_s), (V, H_s), (V,); teacher the same with H_t; labels (N,).

    The comparisons of errors need every row labelled: with fewer rows the products of torch's own gradients would round
    differently from ours.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    heads = [[normal(rows, width), normal(columns, width) / width**0.5, normal(columns)] for width in widths]
    for head in heads:
        head[2] = head[2] if bias else None
    labels = torch.randint(0, columns, (rows,), generator=generator)
    if ignored:
        labels[1::3] = -100
    return Heads(*heads, labels.to(device))


def with_gradients(
    function: Callable[..., tuple[Tensor, ...]],
    heads: Heads,
    upstream: float,
    dtype: torch.dtype | None,
    **keywords: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """(loss, hard, soft) and the gradients of student hidden, weight and, where there is one, bias."""
    leaves = [
        None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        for tensor in heads.student
    ]
    teacher = [None if tensor is None else tensor.to(dtype or tensor.dtype) for tensor in heads.teacher]
    results = function(*leaves, *teacher, heads.labels, **keywords)
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad((results[0] * upstream).sum(), wanted)
    return [result.detach() for result in results], list(gradients)


def reference(*arguments: Any, **keywords: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels = arguments
    teacher = None if teacher_hidden is None else F.linear(teacher_hidden, teacher_weight, teacher_bias)
    return reference_distill_loss(F.linear(hidden, weight, bias), teacher, labels, **keywords)
