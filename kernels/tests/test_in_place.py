"""Statistics with the gradient over the student's logits, as the linear form asks for."""

from __future__ import annotations

import pytest
import torch
from dwt_kernels.arguments import backend_module
from dwt_kernels.layout import Labels, Logits
from dwt_kernels.reference import reference_distill_loss
from torch import Tensor

COLUMNS, PADDED = 301, 320
# Exact in 16 bits. Read as a logit it would be the largest; NaN, read and written, would still be NaN.
PADDING = 8192.0


@pytest.fixture(params=["one block", "two blocks"])
def rows(request, backend, monkeypatch):
    """The functions on rows; few threads of few columns make two blocks of a short row."""
    if backend == "torch":
        pytest.skip("Triton's")
    from dwt_kernels.on_triton import launch

    if request.param == "two blocks":
        monkeypatch.setattr(launch, "COLUMNS_PER_THREAD", 8)
        monkeypatch.setattr(launch, "ROW_WARPS", 1)
    return backend_module("triton")


def as_buffer(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """As the linear form's: aligned rows."""
    buffer = torch.full((logits.shape[0], PADDED), PADDING, dtype=dtype, device=logits.device)
    buffer[:, :COLUMNS] = logits
    return buffer


@pytest.mark.parametrize(("temperature", "soft_positions"), [(1.0, "labelled"), (2.5, "all")])
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
    ],
    ids=str,
)
def test_against_reference(rows, make_inputs, make_objective, dtype, teacher_dtype, temperature, soft_positions):
    student, teacher, labels = make_inputs(COLUMNS, rows=6)
    labels[0], labels[2] = COLUMNS - 1, 0
    student_bias, teacher_bias = student[3].clone(), teacher[3].clone()
    keywords = {"temperature": temperature, "soft_positions": soft_positions}
    counted = labels != -100
    if soft_positions == "all" and teacher_dtype is not None:
        counted[:] = True
    student = as_buffer(student.masked_fill(~counted.unsqueeze(1), float("nan")), dtype)
    logits, bias = student[:, :COLUMNS], None
    teacher_logits = exact_teacher = None
    if teacher_dtype is not None:
        bias, teacher_logits = teacher_bias, as_buffer(teacher, teacher_dtype)[:, :COLUMNS]
        exact_teacher = teacher_logits.double() + bias
    upstream = torch.arange(1.0, 7.0, device=labels.device)
    exact = (logits.double() + student_bias).requires_grad_()
    losses = reference_distill_loss(exact, exact_teacher, labels, reduction="none", **keywords)[0]
    expected = torch.autograd.grad(losses[counted] @ upstream[counted].double(), exact)[0]

    objective = make_objective(backend="triton", reduction="none", **keywords)
    scalars = rows.prepare(labels, COLUMNS, objective)
    both = Logits(logits, teacher_logits, student_bias, bias)
    which = Labels(labels, objective.ignore_index, objective.soft_all and teacher_logits is not None)
    apart = rows.row_statistics(both._replace(student=logits.clone()), which, scalars)
    statistics = rows.row_statistics_and_gradients(upstream, scalars, both, which)
    torch.testing.assert_close(statistics[counted], apart[counted], rtol=2e-6, atol=2e-6)
    # One rounding to nearest; the interpreter truncates.
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(logits[counted].double(), expected[counted], rtol=tolerance, atol=2e-6)
    assert (logits[~counted] == 0).all()
    assert (student[:, COLUMNS:] == PADDING).all()


@pytest.mark.parametrize(
    ("strides", "width"),
    [((30522, 30522, 30522), 8), ((30528, 30522, 30528), 2), ((1001, 1009, 1001), 8), ((1001, 1000, 1001), 1)],
)
def test_width_of_loads_of_rows_that_begin_anywhere(backend, strides, width):
    if backend == "torch":
        pytest.skip("Triton's")
    from dwt_kernels.on_triton.launch import common_width

    matrices = [torch.empty(2, stride, dtype=torch.bfloat16)[:, :900] for stride in strides]
    assert common_width(*matrices) == width
    assert common_width(matrices[0], torch.empty(2, strides[0])[:, :900]) == 4
    assert common_width(matrices[0], torch.empty(900, 2, dtype=torch.bfloat16).t()) == 1
