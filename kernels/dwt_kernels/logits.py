"""``distill_loss``: logits in, loss out; a custom operator forward and one backward, so torch.compile sees one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwt_kernels import arguments
from dwt_kernels.arguments import OBJECTIVE_SCHEMA, Normalizer, Objective, Scalar, backend_module
from dwt_kernels.layout import SCALARS, STATISTICS, Labels, Logits


class DistillLoss(NamedTuple):
    """fp32, 0-d, or (N,) with ``reduction="none"``. ``loss`` carries the gradient, ``hard`` and ``soft`` none."""

    loss: Tensor
    hard: Tensor
    soft: Tensor


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
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
) -> DistillLoss:
    """hard_weight x cross-entropy at temperature 1 + soft_weight x KL(teacher || student) at ``temperature``.

    Args:
        student_logits: (N, V), fp32, bf16 or fp16, any strides; never changed.
        teacher_logits: (N, V), same device, any of these dtypes; -inf is legal. None: the hard loss only. It may be
            made under torch.inference_mode, except where the loss is compiled: torch's compiler cannot save such
            tensors.
        labels: (N,) int64; rows with ``ignore_index`` have no hard loss.
        temperature: tau, a number or a 0-d tensor, positive and finite; divides both models' logits in the soft loss.
        hard_weight, soft_weight: numbers or 0-d tensors. Tensors are on the logits' device and require no grad.
        soft_positions: "labelled": the soft loss counts where the hard one does; "all": on every row.
        temperature_squared: multiply the soft loss by tau^2 (Hinton et al. 2015, section 2).
        vocab_size: columns from here on are padding: no probability, zero gradient. The two widths may then differ.
        normalizer: divides the sums of the means instead of the local counts; a number, a 0-d tensor, or a pair
            (hard, soft); positive and finite. "sum" and "none" divide by nothing.
        reduction: "mean", "sum", or "none" (rows, zero where they do not count).
        backend: "auto" is Triton on a GPU and torch elsewhere.

    Returns:
        DistillLoss(loss, hard, soft) in nats; hard and soft are unweighted.

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong, or a teacher's tensor requires grad. What
            only values on a GPU could tell (label range, a tensor's temperature) is asserted on the device instead.
    """
    arguments.check_float_tensor("student_logits", student_logits, "(N, V)")
    rows, columns = student_logits.shape
    teacher_columns = None
    if teacher_logits is not None:
        arguments.check_float_tensor("teacher_logits", teacher_logits, "(N, V)")
        arguments.check_rows("teacher_logits", teacher_logits, rows)
        teacher_columns = teacher_logits.shape[1]
    arguments.check_labels(labels, rows)
    arguments.check_same_device({"student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels})
    arguments.check_teacher_frozen({"teacher_logits": teacher_logits})
    objective = arguments.resolve_objective(
        student_logits.device,
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
    vocab_size = arguments.resolve_vocab_size("logits", vocab_size, columns, teacher_columns)
    operator = torch.ops.dwt_kernels.distill if torch.compiler.is_compiling() else Distill.apply
    loss, hard, soft, _, _ = operator(student_logits, teacher_logits, labels, vocab_size, *objective)
    return DistillLoss(loss, hard.detach(), soft.detach())


@torch.library.custom_op(
    "dwt_kernels::distill",
    mutates_args=(),
    schema="(Tensor student, Tensor? teacher, Tensor labels, int vocab_size, "
    + OBJECTIVE_SCHEMA
    + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _distill(
    student: Tensor, teacher: Tensor | None, labels: Tensor, vocab_size: int, *keywords: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, hard, soft, statistics (N, 7), scalars (8,) fp64)."""
    objective = Objective(*keywords)
    backend = backend_module(objective.backend)
    scalars = backend.prepare(labels, vocab_size, objective)
    logits = Logits(student[:, :vocab_size], None if teacher is None else teacher[:, :vocab_size])
    rows = Labels(labels, objective.ignore_index, objective.soft_all and teacher is not None)
    statistics = backend.row_statistics(logits, rows, scalars)
    hard, soft = backend.row_losses(statistics, scalars, rows, teacher is not None)
    return *backend.reduce_rows(hard, soft, scalars, objective.reduction), statistics, scalars


@_distill.register_fake
def _distill_fake(
    student: Tensor, teacher: Tensor | None, labels: Tensor, vocab_size: int, *keywords: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    objective = Objective(*keywords)
    rows = student.shape[0]
    shape = (rows,) if objective.reduction == "none" else ()
    loss, hard, soft = (student.new_empty(shape, dtype=torch.float32) for _ in range(3))
    statistics = student.new_empty((rows, STATISTICS), dtype=torch.float32)
    return loss, hard, soft, statistics, student.new_empty((SCALARS,), dtype=torch.float64)


@torch.library.custom_op(
    "dwt_kernels::distill_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor statistics, Tensor scalars, Tensor student, Tensor? teacher, Tensor labels, "
    "int vocab_size, int ignore_index, bool soft_all, str backend) -> Tensor",
)
def _distill_backward(
    upstream: Tensor,
    statistics: Tensor,
    scalars: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    vocab_size: int,
    ignore_index: int,
    soft_all: bool,
    backend: str,
) -> Tensor:
    """d loss / d student (N, V) in the student's dtype; contiguous."""
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    gradient[:, vocab_size:] = 0
    logits = Logits(student[:, :vocab_size], None if teacher is None else teacher[:, :vocab_size])
    rows = Labels(labels, ignore_index, soft_all and teacher is not None)
    backend_module(backend).row_gradients(upstream, scalars, logits, rows, statistics, gradient[:, :vocab_size])
    return gradient


@_distill_backward.register_fake
def _distill_backward_fake(upstream: Tensor, statistics: Tensor, scalars: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def save(ctx: Any, values: Sequence[Any]) -> None:
    """Keep values for the backward pass. Autograd keeps the tensors, and notices if they are changed before then.

    It refuses tensors made under torch.inference_mode, such as a teacher's; these are kept beside it, as numbers are.
    """
    tensors = [value if isinstance(value, Tensor) and not value.is_inference() else None for value in values]
    ctx.save_for_backward(*tensors)
    ctx.others = [value if tensor is None else None for value, tensor in zip(values, tensors)]


def saved(ctx: Any) -> list[Any]:
    return [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, labels, vocab_size, *keywords = inputs
    _, hard, soft, statistics, scalars = output
    objective = Objective(*keywords)
    ctx.mark_non_differentiable(hard, soft, statistics, scalars)
    ctx.set_materialize_grads(False)
    numbers = vocab_size, objective.ignore_index, objective.soft_all, objective.backend
    save(ctx, (statistics, scalars, student, teacher, labels, *numbers))


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient = None if upstream is None else torch.ops.dwt_kernels.distill_backward(upstream, *saved(ctx))
    return gradient, *(None,) * (3 + len(Objective._fields))


_distill.register_autograd(_backward, setup_context=_save_for_backward)


class Distill(torch.autograd.Function):
    """The operator with the same gradient, for eager mode; why is said at ``linear.LinearDistill``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _distill(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)
