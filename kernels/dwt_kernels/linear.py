"""``linear_distill_loss``: hidden states and head weights in, loss out; the gradients are made in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwt_kernels import arguments
from dwt_kernels.arguments import OBJECTIVE_SCHEMA, Normalizer, Objective, Scalar
from dwt_kernels.chunked import chunked_losses_and_gradients
from dwt_kernels.backends import backend_module
from dwt_kernels.head_gradients import saved_dtype, scaled
from dwt_kernels.loss import DistillLoss
from dwt_kernels.memory_mode import resolve_chunk_rows

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
        teacher_hidden: (N, H_t); teacher_weight: (V, H_t); teacher_bias: (V,) or None. All None: the hard loss only.
        memory: "chunked": logits of ``chunk_rows`` rows at a time; "logit_free" (Triton only): none in device memory;
            "auto" chooses.
        chunk_rows: rows in a chunk; None chooses few and large ones.
        The others as in ``distill_loss``.

    Raises:
        ValueError: as in ``distill_loss``.
    """
    has_teacher = teacher_hidden is not None
    if has_teacher != (teacher_weight is not None) or (teacher_bias is not None and not has_teacher):
        raise ValueError(
            "teacher_hidden and teacher_weight come together (teacher_bias only with them); pass both or neither"
        )
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
    vocab_size = arguments.resolve_vocab_size(vocab_size, student_weight.shape[0], teacher_columns)
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
    loss, hard, soft, *_ = torch.ops.dwt_kernels.linear_distill(
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


LINEAR_INPUTS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor labels, int vocab_size, "
    "int? chunk_rows, str memory, bool[] needed, " + OBJECTIVE_SCHEMA
)
NEEDED_POSITION = 10


@torch.library.custom_op(
    "dwt_kernels::linear_distill",
    mutates_args=(),
    schema=f"({LINEAR_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_distill(*inputs: Any) -> tuple[Tensor, ...]:
    """(loss, hard, soft, unit, d hidden, d weight, d bias).

    The gradients are those of the loss divided by ``unit``; one that is not needed, or waits for its rows' upstream
    gradient ("none"), has no elements.
    """
    *heads, labels, vocab_size, chunk_rows, memory, needed = inputs[: -len(Objective._fields)]
    objective = Objective(*inputs[-len(Objective._fields) :])
    backend = backend_module(objective.backend)
    scales = backend.prepare(labels, vocab_size, objective)
    # fp16 has too little range for gradients already divided by thousands of rows: keep them near 1 until they meet
    # the upstream gradient, which holds the loss scale.
    unit = scales[2:].abs().amax() if heads[0].dtype == torch.float16 else torch.ones_like(scales[0])
    relative = torch.where(unit > 0, scales[2:] / unit, 0.0)
    hard, soft, *gradients = losses_and_gradients(
        heads,
        labels,
        torch.ones_like(unit),
        relative,
        vocab_size,
        chunk_rows,
        memory,
        [need and objective.reduction != "none" for need in needed],
        objective,
    )
    return *backend.reduce_rows(hard, soft, scales, objective.reduction), unit, *gradients


@_linear_distill.register_fake
def _linear_distill_fake(*inputs: Any) -> tuple[Tensor, ...]:
    *heads, labels, _, _, _, needed = inputs[: -len(Objective._fields)]
    objective = Objective(*inputs[-len(Objective._fields) :])
    shape = labels.shape if objective.reduction == "none" else ()
    losses = [labels.new_empty(shape, dtype=torch.float32) for _ in range(3)]
    gradients = [empty_gradient(tensor, need and objective.reduction != "none") for tensor, need in zip(heads, needed)]
    return *losses, labels.new_empty((), dtype=torch.float32), *gradients


@torch.library.custom_op(
    "dwt_kernels::linear_distill_rows_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {LINEAR_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _linear_distill_rows_backward(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The gradients for ``reduction="none"``: everything is computed again with the rows' upstream gradients (N,)."""
    *heads, labels, vocab_size, chunk_rows, memory, needed = inputs[: -len(Objective._fields)]
    objective = Objective(*inputs[-len(Objective._fields) :])
    scales = backend_module(objective.backend).prepare(labels, vocab_size, objective)[2:]
    return losses_and_gradients(heads, labels, upstream, scales, vocab_size, chunk_rows, memory, needed, objective)[2:]


@_linear_distill_rows_backward.register_fake
def _linear_distill_rows_backward_fake(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *heads, _, _, _, _, needed = inputs[: -len(Objective._fields)]
    return tuple(empty_gradient(tensor, need) for tensor, need in zip(heads, needed))


@torch.library.custom_op("dwt_kernels::scaled", mutates_args=())
def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return scaled(tensor, factor, dtype)


@_scaled.register_fake
def _scaled_fake(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.new_empty(tensor.shape, dtype=dtype)


def losses_and_gradients(
    heads: Sequence[Tensor | None],
    labels: Tensor,
    upstream: Tensor,
    scales: Tensor,
    vocab_size: int,
    chunk_rows: int | None,
    memory: str,
    needed: Sequence[bool],
    objective: Objective,
) -> tuple[Tensor, ...]:
    """hard (N,), soft (N,) and the three gradients, for all rows and columns.

    On a CPU the rows that do not count are left out before the products. On a GPU that would take a host
    synchronisation; the caller who knows the labels leaves them out.
    """
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias = heads
    assert student_hidden is not None
    rows = student_hidden.shape[0]
    counted = None
    if labels.device.type == "cpu" and not (objective.soft_all and teacher_hidden is not None):
        counted = (labels != objective.ignore_index).nonzero().squeeze(1)
        if counted.shape[0] == rows:
            counted = None
    if counted is not None:
        student_hidden, labels = student_hidden[counted], labels[counted]
        teacher_hidden = None if teacher_hidden is None else teacher_hidden[counted]
        upstream = upstream[counted] if upstream.dim() == 1 else upstream
    columns = (
        student_hidden,
        *(None if tensor is None else tensor[:vocab_size] for tensor in (student_weight, student_bias)),
        teacher_hidden,
        *(None if tensor is None else tensor[:vocab_size] for tensor in (teacher_weight, teacher_bias)),
    )
    rows_in_chunk = resolve_chunk_rows(
        memory, chunk_rows, objective.backend, labels.shape[0], vocab_size, student_hidden, teacher_hidden
    )
    if rows_in_chunk is None:
        from dwt_kernels.logit_free import logit_free_losses_and_gradients

        hard, soft, *gradients = logit_free_losses_and_gradients(
            *columns, labels, upstream, scales, list(needed), objective
        )
    else:
        hard, soft, *gradients = chunked_losses_and_gradients(
            *columns, labels, upstream, scales, rows_in_chunk, list(needed), objective
        )
    if counted is not None:
        hard, soft = (hard.new_zeros(rows).index_copy_(0, counted, values) for values in (hard, soft))
    results = []
    for position, (tensor, need, gradient) in enumerate(zip(heads, needed, gradients)):
        result = empty_gradient(tensor, need)
        if gradient is None:
            result.zero_()
        elif position == 0 and counted is not None:
            result.zero_().index_copy_(0, counted, gradient.to(result.dtype))
        elif gradient.shape == result.shape and gradient.dtype == result.dtype:
            result = gradient
        else:
            result[gradient.shape[0] :] = 0
            result[: gradient.shape[0]] = gradient
        results.append(result)
    return hard, soft, *results


def empty_gradient(tensor: Tensor | None, need: bool) -> Tensor:
    assert not need or tensor is not None
    if tensor is None or not need:
        return torch.empty(0, device=None if tensor is None else tensor.device)
    return torch.empty(tensor.shape, dtype=saved_dtype(tensor), device=tensor.device)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, hard, soft, unit, *gradients = output
    ctx.mark_non_differentiable(hard, soft, unit, *gradients)
    ctx.set_materialize_grads(False)
    ctx.head_dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.per_row = Objective(*inputs[-len(Objective._fields) :]).reduction == "none"
    if ctx.per_row:
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
    else:
        # Not the weights: under ZeRO-3 they may be gone by the time of the backward pass.
        ctx.needed = inputs[NEEDED_POSITION]
        ctx.save_for_backward(unit, *gradients)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    results: list[Tensor | None] = [None, None, None]
    if upstream is not None:
        if ctx.per_row:
            inputs = [
                constant if tensor is None else tensor for tensor, constant in zip(ctx.saved_tensors, ctx.constants)
            ]
            needed, factor = inputs[NEEDED_POSITION], upstream.new_ones(())
            gradients = torch.ops.dwt_kernels.linear_distill_rows_backward(upstream, *inputs)
        else:
            unit, *gradients = ctx.saved_tensors
            needed, factor = ctx.needed, upstream * unit
        results = [
            torch.ops.dwt_kernels.scaled(gradient, factor, dtype) if need else None
            for gradient, dtype, need in zip(gradients, ctx.head_dtypes, needed)
        ]
    return *results, *(None,) * (8 + len(Objective._fields))


_linear_distill.register_autograd(_backward, setup_context=_save_for_backward)
