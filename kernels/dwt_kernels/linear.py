"""``linear_distill_loss``: hidden states and head weights in, loss out; the gradients are made in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from dwt_kernels import arguments
from dwt_kernels.arguments import Normalizer, Scalar
from dwt_kernels.linear_ops import linear_distill
from dwt_kernels.loss import DistillLoss

MEMORY = ("auto", "chunked", "logit_free")


def linear_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    *,
    temperature: Scalar = 1.0,
    hard_weight: Scalar = 1.0,
    soft_weight: Scalar = 1.0,
    ignore_index: int = -100,
    soft_positions: str = "labelled",
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    normalizer: Normalizer = None,
    reduction: str = "mean",
    backend: str = "auto",
    memory: str = "auto",
    chunk_rows: int | None = None,
) -> DistillLoss:
    """``distill_loss`` of student_hidden @ student_weight.T + student_bias and the same for the teacher.

    Args:
        student_hidden: (N, H_s); student_weight: (V, H_s); student_bias: (V,) or None. Same dtype for the first two.
        teacher_hidden: (N, H_t); teacher_weight: (V, H_t); teacher_bias: (V,) or None. teacher_hidden None: the hard
            loss only, whatever the other two are.
        memory: "chunked": logits of ``chunk_rows`` rows at a time; "logit_free" (Triton only): none in device memory;
            "auto" chooses.
        chunk_rows: rows in a chunk; None chooses few and large ones.
        The others as in ``distill_loss``.

    Raises:
        ValueError: as in ``distill_loss``.
    """
    if teacher_hidden is None:
        teacher_weight = teacher_bias = None
    elif teacher_weight is None:
        raise ValueError("teacher_weight is None beside a teacher_hidden; pass both, or teacher_hidden=None")
    rows = check_head("student", student_hidden, student_weight, student_bias)
    teacher_columns = None
    if teacher_hidden is not None and teacher_weight is not None:
        arguments.check_rows("teacher_hidden", teacher_hidden, rows)
        check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
        teacher_columns = teacher_weight.shape[0]
    arguments.check_labels(labels, rows)
    teacher = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    student = {"student_hidden": student_hidden, "student_weight": student_weight, "student_bias": student_bias}
    arguments.check_same_device({**student, **teacher, "labels": labels})
    arguments.check_teacher_frozen(teacher)
    arguments.check_choice("memory", memory, MEMORY)
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"chunk_rows must be a positive int or None, got {chunk_rows!r}")
    objective = arguments.resolve_objective(
        student_hidden.device,
        temperature=temperature,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        ignore_index=ignore_index,
        soft_positions=soft_positions,
        temperature_squared=temperature_squared,
        normalizer=normalizer,
        reduction=reduction,
        backend=backend,
    )
    if memory == "logit_free" and objective.backend != "triton":
        raise ValueError('memory="logit_free" needs backend="triton"; on a CPU use "chunked" with a small chunk_rows')
    vocab_size = arguments.resolve_vocab_size("weight", vocab_size, student_weight.shape[0], teacher_columns)
    in_autocast = torch.is_autocast_enabled(student_hidden.device.type)
    if in_autocast:
        dtype = torch.get_autocast_dtype(student_hidden.device.type)
        student_hidden, student_weight = student_hidden.to(dtype), student_weight.to(dtype)
        if teacher_hidden is not None and teacher_weight is not None:
            teacher_hidden, teacher_weight = teacher_hidden.to(dtype), teacher_weight.to(dtype)
    needed = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in (student_hidden, student_weight, student_bias)
    ]
    loss, hard, soft, *_ = linear_distill(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        labels,
        vocab_size,
        chunk_rows,
        memory,
        needed,
        *objective,
    )
    return DistillLoss(loss, hard.detach(), soft.detach())


def check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The number of rows N."""
    arguments.check_float_tensor(f"{name}_hidden", hidden, "(N, H)")
    arguments.check_float_tensor(f"{name}_weight", weight, "(V, H)")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name}_weight must have shape (V, {hidden.shape[1]}) as {name}_hidden is {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"{name}_weight is {weight.dtype} and {name}_hidden {hidden.dtype}; use one dtype or autocast")
    if bias is not None:
        arguments.check_float_tensor(f"{name}_bias", bias, "(V,)")
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{name}_bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    return hidden.shape[0]
