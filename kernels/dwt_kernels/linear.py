"""``linear_distill_loss``: hidden states and head weights in, loss out; torch.compile sees one operator each way.

The gradients are made in the forward pass and wait for the upstream gradient, so that the backward pass needs neither
the logits nor the weights, which under ZeRO-3 may have left the memory by then. In 16 bits they are rounded as they
wait and again when multiplied by it: once more than torch's are, unless it is a power of 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwt_kernels import arguments
from dwt_kernels.arguments import Normalizer, Scalar, backend_module
from dwt_kernels.layout import Scalars
from dwt_kernels.linear_call import (
    INPUT_COUNT,
    INPUTS,
    LinearCall,
    empty_gradient,
    gradients_made_forward,
    parse,
    statistics_and_gradients,
)
from dwt_kernels.logits import DistillLoss, save, saved

MEMORY = ("auto", "chunked", "logit_free")

SECOND_DERIVATIVE = b"linear_distill_loss has no second derivative; for one, make the logits and use torch's own losses"


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
        student_hidden: (N, H_s); student_weight: (V, H_s); student_bias: (V,) or None. fp32, bf16 or fp16; the first
            two of one dtype, except under autocast, which casts both.
        teacher_hidden: (N, H_t); teacher_weight: (V, H_t); teacher_bias: (V,) or None. Likewise, maybe in another
            dtype. teacher_hidden None: the hard loss only, whatever the other two are.
        memory: "chunked": logits of ``chunk_rows`` rows at a time; "logit_free" (Triton only): none in device memory;
            "auto" chooses.
        chunk_rows: rows in a chunk, 1 or more; None chooses few and large ones.
        The others as in ``distill_loss``.

    Returns:
        As ``distill_loss``. Gradients have their parameters' dtypes.

    Raises:
        ValueError: as in ``distill_loss``; "logit_free" without Triton.
        RuntimeError: "logit_free" under ``torch.use_deterministic_algorithms(True)``.
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
    operator = linear_distill if torch.compiler.is_compiling() else LinearDistill.apply
    heads = student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    loss, hard, soft, *_ = operator(*heads, labels, vocab_size, chunk_rows, memory, needed, *objective)
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


@torch.library.custom_op(
    "dwt_kernels::linear_distill",
    mutates_args=(),
    schema=f"({INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_distill(*inputs: Any) -> tuple[Tensor, ...]:
    """(loss, hard, soft, unit, d hidden, d weight, d bias).

    For fp16 the gradients are those of the loss divided by ``unit``; for other dtypes ``unit`` has no elements. A
    gradient has no elements if it is not needed, or cannot be made before its rows' upstream gradient ("none").
    """
    call = parse(inputs)
    backend = backend_module(call.objective.backend)
    scalars = backend.prepare(call.labels.values, call.vocab_size, call.objective)
    # fp16 has too little range for gradients already divided by thousands of rows: keep them near 1 until they meet
    # the upstream gradient, which holds the loss scale.
    unit, relative = empty_unit(call), scalars
    if has_unit(call):
        unit, relative = unit_gradients(scalars)
    needed = gradients_made_forward(call)
    one = torch.ones((), dtype=torch.float32, device=call.labels.values.device)
    statistics, *gradients = statistics_and_gradients(call._replace(needed=needed), one, relative)
    hard, soft = backend.row_losses(statistics, scalars, call.labels, call.teacher is not None)
    return *backend.reduce_rows(hard, soft, scalars, call.objective.reduction), unit, *gradients


@linear_distill.register_fake
def _linear_distill_fake(*inputs: Any) -> tuple[Tensor, ...]:
    call = parse(inputs)
    labels = call.labels.values
    shape = labels.shape if call.objective.reduction == "none" else ()
    losses = [labels.new_empty(shape, dtype=torch.float32) for _ in range(3)]
    gradients = [empty_gradient(*pair, labels.device) for pair in zip(call.student, gradients_made_forward(call))]
    return *losses, empty_unit(call), *gradients


@torch.library.custom_op(
    "dwt_kernels::linear_distill_rows_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def linear_distill_rows_backward(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The gradients for ``reduction="none"``: everything is computed again with the rows' upstream gradients (N,)."""
    call = parse(inputs)
    scalars = backend_module(call.objective.backend).prepare(call.labels.values, call.vocab_size, call.objective)
    return statistics_and_gradients(call, upstream, scalars)[1:]


@linear_distill_rows_backward.register_fake
def _linear_distill_rows_backward_fake(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    call = parse(inputs)
    return tuple(empty_gradient(*pair, call.labels.values.device) for pair in zip(call.student, call.needed))


@torch.library.custom_op("dwt_kernels::scaled", mutates_args=())
def scaled_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return backend_module(backend).scaled(gradient, factor, dtype)


@scaled_gradient.register_fake
def _scaled_gradient_fake(gradient: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


def has_unit(call: LinearCall) -> bool:
    return call.student.hidden.dtype == torch.float16


def empty_unit(call: LinearCall) -> Tensor:
    return call.labels.values.new_empty(() if has_unit(call) else 0, dtype=torch.float64)


def unit_gradients(scalars: Tensor) -> tuple[Tensor, Tensor]:
    """unit (0-d), and ``scalars`` with the gradients' scales divided by it, so that the larger one is 1."""
    named = Scalars(*scalars.unbind())
    unit = torch.maximum(named.hard_gradient.abs(), named.soft_gradient.abs())
    divisor = unit.masked_fill(unit == 0, 1.0)
    relative = named._replace(hard_gradient=named.hard_gradient / divisor, soft_gradient=named.soft_gradient / divisor)
    return unit, torch.stack(list(relative))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = parse(inputs)
    _, hard, soft, unit, *gradients = output
    ctx.mark_non_differentiable(hard, soft, unit, *gradients)
    ctx.set_materialize_grads(False)
    ctx.needed = list(call.needed)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in call.student]
    ctx.backend = call.objective.backend
    ctx.per_row = call.objective.reduction == "none"
    if ctx.per_row:
        save(ctx, inputs)
    else:
        ctx.save_for_backward(unit, *gradients)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * INPUT_COUNT
    if ctx.per_row:
        factor = upstream.new_ones(())
        gradients = linear_distill_rows_backward(upstream, *saved(ctx))
    else:
        unit, *gradients = ctx.saved_tensors
        factor = (upstream * unit).float() if unit.numel() > 0 else upstream
    results = [
        scaled_gradient(gradient, factor, dtype, ctx.backend) if need else None
        for gradient, dtype, need in zip(gradients, ctx.dtypes, ctx.needed)
    ]
    once = differentiable_once(results) if torch.is_grad_enabled() else results
    return *once, *(None,) * (INPUT_COUNT - len(results))


def differentiable_once(results: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients for ``create_graph=True``: differentiating them raises an error.

    They were made in the forward pass, so autograd takes them for constants. torch's ``once_differentiable`` is not
    enough: it raises only where the upstream gradient requires a gradient.
    """
    fail: Any = torch._C._functions.DelayedError(SECOND_DERIVATIVE, len(results))
    return fail(*(None if result is None else result.detach().requires_grad_() for result in results))


linear_distill.register_autograd(_backward, setup_context=_save_for_backward)


class LinearDistill(torch.autograd.Function):
    """``linear_distill`` with the same gradient, for eager mode.

    What ``register_autograd`` adds copies the operator's schema in every call, once for each of its 21 inputs: a third
    of a millisecond of the host. torch.compile needs it, and does it once.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = linear_distill(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)
