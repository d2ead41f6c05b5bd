"""What a call of the linear form's operators computes: the statistics of its rows, and gradients as they wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwt_kernels.arguments import OBJECTIVE_SCHEMA, Objective
from dwt_kernels.layout import STATISTICS, Labels
from dwt_kernels.linear_chunked import Head, chunked_statistics_and_gradients, resolve_chunk_rows, saved_dtype

INPUTS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor labels, int vocab_size, "
    "int? chunk_rows, str memory, bool[] needed, " + OBJECTIVE_SCHEMA
)
INPUT_COUNT = 11 + len(Objective._fields)


class LinearCall(NamedTuple):
    """An operator's inputs by name. ``needed``: gradients of student hidden, weight, bias."""

    student: Head
    teacher: Head | None
    labels: Labels
    vocab_size: int
    chunk_rows: int | None
    memory: str
    needed: Sequence[bool]
    objective: Objective


def parse(inputs: Sequence[Any]) -> LinearCall:
    teacher = None if inputs[3] is None else Head(*inputs[3:6])
    values, vocab_size, chunk_rows, memory, needed = inputs[6:11]
    objective = Objective(*inputs[11:])
    labels = Labels(values, objective.ignore_index, objective.soft_all and teacher is not None)
    return LinearCall(Head(*inputs[:3]), teacher, labels, vocab_size, chunk_rows, memory, needed, objective)


def statistics_and_gradients(call: LinearCall, upstream: Tensor, scalars: Tensor) -> tuple[Tensor, ...]:
    """Statistics (N, 7) and the three gradients, over all rows and columns.

    On a CPU the rows that do not count are left out before the products. On a GPU that would take a host
    synchronisation; the caller who knows the labels leaves them out.
    """
    student, teacher, labels = call.student, call.teacher, call.labels
    counted = labels.counted()
    if counted is not None:
        student, labels = student.of_rows(counted), labels._replace(values=labels.values[counted])
        teacher = None if teacher is None else teacher.of_rows(counted)
        upstream = upstream[counted] if upstream.dim() == 1 else upstream
    student = student.of_columns(call.vocab_size)
    teacher = None if teacher is None else teacher.of_columns(call.vocab_size)
    backend = call.objective.backend
    asked = (call.memory, call.chunk_rows, backend)
    chunk_rows = resolve_chunk_rows(*asked, student, teacher, with_gradients=any(call.needed))
    inputs = (student, teacher, labels, upstream, scalars, call.needed)
    if chunk_rows is None:
        from dwt_kernels.logit_free import logit_free_statistics_and_gradients

        statistics, *gradients = logit_free_statistics_and_gradients(*inputs)
    else:
        statistics, *gradients = chunked_statistics_and_gradients(*inputs, chunk_rows, backend)
    if counted is not None:
        all_rows = statistics.new_ones(call.labels.values.shape[0], STATISTICS)
        statistics = all_rows.index_copy_(0, counted, statistics)
    d_hidden, d_weight, d_bias = (
        whole_gradient(gradient, parameter, need, labels.values.device, None if position else counted)
        for position, (gradient, parameter, need) in enumerate(zip(gradients, call.student, call.needed))
    )
    return statistics, d_hidden, d_weight, d_bias


def whole_gradient(
    gradient: Tensor | None, parameter: Tensor | None, need: bool, device: torch.device, rows: Tensor | None
) -> Tensor:
    """As ``empty_gradient``, filled with ``gradient``: of ``rows`` where they are given, maybe without padded columns.

    None, where no row was there to add up, is zero.
    """
    if gradient is None or parameter is None:
        return empty_gradient(parameter, need, device).zero_()
    if rows is None and gradient.shape == parameter.shape and gradient.dtype == saved_dtype(parameter):
        return gradient
    whole = empty_gradient(parameter, need, device)
    if rows is not None:
        return whole.zero_().index_copy_(0, rows, gradient.to(whole.dtype))
    if gradient.shape[0] < whole.shape[0]:
        whole[gradient.shape[0] :] = 0
    whole[: gradient.shape[0]] = gradient
    return whole


def gradients_made_forward(call: LinearCall) -> list[bool]:
    return [need and call.objective.reduction != "none" for need in call.needed]


def empty_gradient(parameter: Tensor | None, need: bool, device: torch.device) -> Tensor:
    """Room for a gradient as it waits for the backward pass; without elements where it is not needed."""
    if parameter is None or not need:
        return torch.empty(0, device=device)
    return torch.empty(parameter.shape, dtype=saved_dtype(parameter), device=device)
