"""What only the plain-torch back end has: blocks of rows, and a gradient fused by torch.compile."""

from __future__ import annotations

import logging

import pytest
import torch
from dwt_kernels import distill_loss
from dwt_kernels.layout import Labels, Logits
from dwt_kernels.on_torch import fusion, rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's path; inputs are on this machine's GPU")


def gradient_of(student: torch.Tensor, *others: torch.Tensor, **keywords: float) -> torch.Tensor:
    student = student.detach().requires_grad_()
    loss = distill_loss(student, *others, backend="torch", **keywords).loss
    return torch.autograd.grad(loss * -3.7, student)[0]


@pytest.mark.parametrize("ignored", [True, False])
def test_blocks_of_rows_do_not_change_the_result(make_inputs, monkeypatch, ignored):
    student, teacher, labels = make_inputs(300)
    if not ignored:
        labels = labels.clamp(min=0)
    whole = distill_loss(student, teacher, labels, backend="torch", temperature=2.0, reduction="none")
    whole_gradient = gradient_of(student, teacher, labels, temperature=2.0)
    monkeypatch.setattr(rows, "BLOCK_ELEMENTS", 2000)
    blocks = list(rows.row_blocks(student, None))
    assert len(blocks) > 10
    assert all(buffer.numel() <= 2000 * torch.get_num_threads() for _, buffers in blocks for buffer in buffers)
    result = distill_loss(student, teacher, labels, backend="torch", temperature=2.0, reduction="none")
    torch.testing.assert_close(result, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient_of(student, teacher, labels, temperature=2.0), whole_gradient)


def test_a_row_longer_than_a_block(make_inputs, monkeypatch):
    student, teacher, labels = make_inputs(300, rows=4)
    whole = gradient_of(student, teacher, labels)
    monkeypatch.setattr(rows, "BLOCK_ELEMENTS", 10)
    torch.testing.assert_close(gradient_of(student, teacher, labels), whole)


@pytest.fixture
def always_fused(monkeypatch) -> list[bool]:
    """Fusion for any size; the returned list says for each call whether it was fused."""
    done: list[bool] = []
    write_gradient = fusion.write_gradient

    def recording(*arguments: object) -> None:
        write_gradient(*arguments)
        done.append(not fusion._broken)

    monkeypatch.setattr(fusion, "FUSION_ELEMENTS", 1)
    monkeypatch.setattr(fusion, "_broken", False)
    monkeypatch.setattr(fusion, "write_gradient", recording)
    return done


@pytest.mark.skipif(not fusion.has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("dtype", "temperature", "hard_only"),
    [
        (torch.bfloat16, 2.5, False),
        pytest.param(torch.float32, 1.0, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 1.0, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_fused_gradient_is_as_exact(make_inputs, assert_exact, always_fused, dtype, temperature, hard_only):
    student, teacher, labels = make_inputs(401, dtype, rows=300)
    labels = labels.clamp(min=0)
    teacher = None if hard_only else teacher
    assert_exact(distill_loss, student, teacher, labels, backend="torch", temperature=temperature, upstream=-3.7)
    assert always_fused == [True]


@pytest.mark.skipif(not fusion.has_compiler(), reason="needs a C++ compiler")
def test_fused_gradient_with_rows_that_do_not_count(make_inputs, monkeypatch, always_fused):
    """They may hold anything, and are zero. Where few rows count, those alone are computed, one operation at a time."""
    student, teacher, labels = make_inputs(401, rows=300)
    ignored = labels == -100
    student[ignored], teacher[ignored] = float("nan"), float("inf")
    fused = gradient_of(student, teacher, labels, temperature=2.5)
    few = torch.where(torch.arange(300) < 100, labels, -100)
    gradient_of(student, teacher, few, temperature=2.5)
    assert always_fused == [True]
    monkeypatch.setattr(fusion, "FUSION_ELEMENTS", 1 << 40)
    torch.testing.assert_close(fused, gradient_of(student, teacher, labels, temperature=2.5))
    assert not fused[ignored].any()


@pytest.mark.parametrize("compiler", ["works", "fails at the second block"])
def test_fused_gradient_in_place(compiler, make_inputs, make_objective, monkeypatch, always_fused):
    """As the linear form asks for it, over the student's logits and in several blocks."""
    if not fusion.has_compiler():
        pytest.skip("needs a C++ compiler")
    student, teacher, labels = make_inputs(401, rows=300)
    labels = labels.clamp(min=0)
    expected = gradient_of(student, teacher, labels, temperature=2.5)
    monkeypatch.setattr(fusion, "BLOCK_ELEMENTS", 401 * 70)
    scalars = rows.prepare(labels, 401, make_objective(temperature=2.5, backend="torch"))
    calls: list[object] = []

    def fails_at_the_second_block(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return fusion._rounded_gradient(*arguments)

    if compiler != "works":
        monkeypatch.setattr(fusion, "fused_gradient", lambda: fails_at_the_second_block)
    which = Labels(labels, -100, False)
    rows.row_statistics_and_gradients(torch.tensor(-3.7), scalars, Logits(student, teacher), which)
    assert always_fused == [True, compiler == "works"]
    torch.testing.assert_close(student, expected)


@pytest.mark.parametrize(("message", "logged"), [("no such file: omp.h\nand more", "omp.h"), ("", "RuntimeError")])
def test_without_a_working_compiler_plain_operations_are_used(
    make_inputs, monkeypatch, caplog, always_fused, message, logged
):
    student, teacher, labels = make_inputs(300)
    labels = labels.clamp(min=0)

    def broken(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(fusion, "fused_gradient", lambda: broken)
    with caplog.at_level(logging.WARNING):
        gradient = gradient_of(student, teacher, labels)
    assert always_fused == [False]
    assert logged in caplog.text
    assert not fusion.pays(student)
    monkeypatch.setattr(fusion, "FUSION_ELEMENTS", 1 << 40)
    torch.testing.assert_close(gradient, gradient_of(student, teacher, labels))
