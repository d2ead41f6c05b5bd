"""Vocabularies of 256,000, and logits at offsets that 32 bits do not hold."""

from __future__ import annotations

import pytest
import torch
from dwt_kernels import distill_loss
from dwt_kernels.arguments import backend_module
from dwt_kernels.layout import Labels, Logits

VOCABULARY = 256_000


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_largest_vocabulary(backend, make_inputs, assert_exact, temperature):
    inputs = make_inputs(VOCABULARY, torch.bfloat16, rows=4)
    assert_exact(distill_loss, *inputs, backend=backend, temperature=temperature)


def test_rows_far_apart(backend, make_inputs):
    """The last row begins 2 x (2^30 + 8) elements after the first."""
    student, teacher, labels = make_inputs(401, torch.bfloat16, rows=3)
    labels[1] = 7
    # Loads follow the rows' alignment, and the order of additions the loads: that is to be the same.
    expected = _with_gradient(_rows_apart(student, 408), _rows_apart(teacher, 408), labels, backend)
    for ours, exact in zip(_with_gradient(_far_apart(student), _far_apart(teacher), labels, backend), expected):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_of_a_gradient_far_apart(backend, make_inputs, make_objective, in_place):
    """As above, of what is written: a gradient of its own, and one over the student's logits."""
    student, teacher, labels = make_inputs(401, torch.bfloat16, rows=3)
    labels[1] = 7
    rows = backend_module(backend)
    objective = make_objective(temperature=2.0, backend=backend)
    scalars, upstream = rows.prepare(labels, 401, objective), torch.ones((), device=labels.device)
    far, which = _far_apart(student), Labels(labels, -100, False)
    if in_place:
        rows.row_statistics_and_gradients(upstream, scalars, Logits(far, teacher), which)
    else:
        logits = Logits(student, teacher)
        statistics = rows.row_statistics(logits, which, scalars)
        rows.row_gradients(upstream, scalars, logits, which, statistics, far)
    _, expected = _with_gradient(student, teacher, labels, backend)
    torch.testing.assert_close(far, expected)


@pytest.mark.slow
def test_more_logits_than_32_bits_count(backend, make_inputs):
    """The gradient of the last rows lies beyond 2^31 elements. All rows share one row's memory; most do not count."""
    rows = 2**31 // VOCABULARY + 3
    student, teacher, labels = make_inputs(VOCABULARY, torch.bfloat16, rows=1)
    all_labels = torch.full((rows,), -100, device=labels.device)
    all_labels[[0, -2, -1]] = labels[0]
    expected = _with_gradient(student, teacher, labels, backend, normalizer=3)
    shape = (rows, VOCABULARY)
    loss, gradient = _with_gradient(student.expand(shape), teacher.expand(shape), all_labels, backend, normalizer=3)
    torch.testing.assert_close(loss, 3 * expected[0])
    exact = expected[1][0].float()
    for row in (0, -2, -1):
        # One row is computed otherwise than many; the difference is bf16's rounding.
        assert (gradient[row].float() - exact).norm() < 2**-8 * exact.norm()
    assert not gradient[1].any()
    assert not gradient[-3].any()


def _far_apart(near):
    return _rows_apart(near, 2**30 + 8)


def _rows_apart(near, stride):
    """The same rows so many elements apart, in memory that is touched only where they are."""
    storage = torch.empty((near.shape[0] - 1) * stride + near.shape[1], dtype=near.dtype, device=near.device)
    return storage.as_strided(near.shape, (stride, 1)).copy_(near)


def _with_gradient(student, teacher, labels, backend, **keywords):
    student = student.detach().requires_grad_()
    loss = distill_loss(student, teacher, labels, backend=backend, temperature=2.0, **keywords).loss
    return loss.detach(), torch.autograd.grad(loss, student)[0]
