"""Losses and gradients against the fp64 reference, over sizes, temperatures, dtypes and every keyword."""

from __future__ import annotations

import pytest
import torch
from dwt_kernels import distill_loss
from dwt_kernels.reference import reference_distill_loss
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 41, 401, 1271, 5000])
def test_sizes_and_dtypes(backend, make_inputs, assert_exact, columns, dtype):
    assert_exact(distill_loss, *make_inputs(columns, dtype), backend=backend, temperature=2.0)


@pytest.mark.parametrize(
    ("temperature", "columns"), [(0.5, 5000), (1.0, 401), (1.7, 401), (2.5, 401), (8.0, 5000)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(backend, make_inputs, assert_exact, temperature, columns, dtype):
    """The extremes over two blocks, whose sums are rescaled by exponentials at the temperature."""
    keywords = {"temperature": temperature, "temperature_squared": True}
    assert_exact(distill_loss, *make_inputs(columns, dtype), backend=backend, **keywords)


@pytest.mark.parametrize(("columns", "vocab_size"), [(30522, None), (30528, 30522)])
def test_bert_vocabulary(backend, make_inputs, assert_exact, columns, vocab_size):
    student, teacher, labels = make_inputs(columns, torch.bfloat16)
    labels[0], labels[2:] = 30521, labels[2:].clamp(max=30521)
    assert_exact(distill_loss, student, teacher, labels, backend=backend, temperature=2.0, vocab_size=vocab_size)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft_positions", ["labelled", "all"])
@pytest.mark.parametrize("normalizer", [None, 7, (3.0, 5.0)], ids=str)
def test_reductions_and_normalizers(backend, make_inputs, assert_exact, reduction, soft_positions, normalizer):
    assert_exact(
        distill_loss,
        *make_inputs(70),
        backend=backend,
        temperature=3.0,
        reduction=reduction,
        soft_positions=soft_positions,
        normalizer=normalizer,
        hard_weight=0.7,
        soft_weight=1.3,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient(backend, make_inputs, assert_exact, reduction):
    assert_exact(distill_loss, *make_inputs(70), backend=backend, upstream=-3.7, reduction=reduction)


def test_upstream_gradient_of_loss_scale_keeps_small_fp16_gradients(backend, make_inputs, assert_exact):
    """Divided by 20,000 rows, fp16 gradients are below its range; a loss scale of 65,536 brings them back."""
    inputs = make_inputs(401, torch.float16)
    assert_exact(distill_loss, *inputs, backend=backend, upstream=65536.0, normalizer=20000)


def test_hard_only(backend, make_inputs, assert_exact):
    student, _, labels = make_inputs(300)
    assert_exact(distill_loss, student, None, labels, backend=backend, hard_weight=0.5)


def test_soft_only(backend, make_inputs, assert_exact):
    student, teacher, labels = make_inputs(300)
    labels[:] = -100
    keywords = {"hard_weight": 0.0, "soft_positions": "all", "temperature": 2.0}
    assert_exact(distill_loss, student, teacher, labels, backend=backend, **keywords)


def test_weights_temperature_and_normalizer_as_tensors(backend, make_inputs, assert_exact):
    student, teacher, labels = make_inputs(70)
    scalars = torch.tensor([0.3, 1.7, 2.5, 9.0], device=student.device)
    assert_exact(
        distill_loss,
        student,
        teacher,
        labels,
        backend=backend,
        hard_weight=scalars[0],
        soft_weight=scalars[1],
        temperature=scalars[2],
        normalizer=(scalars[3], 4),
    )


def test_other_ignore_index(backend, make_inputs, assert_exact):
    student, teacher, labels = make_inputs(70)
    labels[labels == -100] = 0
    assert_exact(distill_loss, student, teacher, labels, backend=backend, ignore_index=0)


def test_mixed_dtypes(backend, make_inputs, assert_exact):
    student, teacher, labels = make_inputs(300)
    assert_exact(distill_loss, student.bfloat16(), teacher.half(), labels, backend=backend, temperature=2.0)


def test_any_stride(backend, make_inputs, assert_exact):
    student, teacher, labels = make_inputs(700)
    wide = torch.full((student.shape[0], 1500), float("nan"), device=student.device)
    every_other = wide[:, 1:1401:2]
    every_other.copy_(student)
    transposed = teacher.t().contiguous().t()
    spaced_labels = torch.stack([labels, labels + 1], 1)[:, 0]
    assert_exact(distill_loss, every_other, transposed, spaced_labels, backend=backend, temperature=2.0)
    expanded = teacher[:1].expand_as(teacher)
    result = distill_loss(student, expanded, labels, backend=backend, temperature=2.0, reduction="none")
    same = distill_loss(student, expanded.contiguous(), labels, backend=backend, temperature=2.0, reduction="none")
    torch.testing.assert_close(result, same, rtol=0, atol=0)


# Below one load, below one block, and few more than a block, which then is no whole one in every row.
@pytest.mark.parametrize("columns", [3, 401, 4098])
@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_that_begin_anywhere(backend, make_inputs, assert_exact, columns, student_dtype):
    """Both models' rows alike, and each elsewhere: in a storage at an odd offset, with padding, in another dtype."""
    student, teacher, labels = make_inputs(columns)
    student, teacher = student.to(student_dtype), teacher.bfloat16()
    storage = student.new_empty(3 + student.numel())
    shifted = storage[3:].view_as(student).copy_(student)
    padded = teacher.new_full((len(teacher), columns + 3), float("nan"))[:, :columns].copy_(teacher)
    for each in (teacher, padded):
        assert_exact(distill_loss, shifted, each, labels, backend=backend, temperature=2.0)


def test_teacher_of_another_width_under_vocab_size(backend, make_inputs, assert_exact):
    student, teacher, labels = make_inputs(130)
    labels = labels.clamp(max=99)
    assert_exact(distill_loss, student, teacher[:, :100], labels, backend=backend, vocab_size=100)


def test_padding_columns_get_no_probability_and_no_gradient(backend, make_inputs):
    student, teacher, labels = make_inputs(128)
    labels = labels.clamp(max=99)
    plain = distill_loss(student[:, :100], teacher[:, :100], labels, backend=backend, temperature=2.0)
    student[:, 100:] = 1e4
    teacher[:, 100:] = float("nan")
    student.requires_grad_()
    padded = distill_loss(student, teacher, labels, backend=backend, temperature=2.0, vocab_size=100)
    padded.loss.backward()
    torch.testing.assert_close(padded, plain)
    assert (student.grad[:, 100:] == 0).all()
    assert (student.grad[0, :100] != 0).any()


def test_rows_that_do_not_count_may_hold_anything(backend, make_inputs):
    student, teacher, labels = make_inputs(70)
    ignored = labels == -100
    expected = distill_loss(student, teacher, labels, backend=backend, temperature=2.0)
    student[ignored], teacher[ignored] = float("nan"), float("inf")
    student.requires_grad_()
    result = distill_loss(student, teacher, labels, backend=backend, temperature=2.0)
    result.loss.backward()
    torch.testing.assert_close(result, expected)
    assert (student.grad[ignored] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(backend, make_inputs, reduction):
    student, teacher, labels = make_inputs(70)
    labels[:] = -100
    student.requires_grad_()
    result = distill_loss(student, teacher, labels, backend=backend, reduction=reduction)
    result.loss.sum().backward()
    assert all((value == 0).all() for value in result)
    assert (student.grad == 0).all()


def test_no_rows(backend, device):
    student = torch.zeros(0, 70, device=device, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    result = distill_loss(student, torch.zeros(0, 70, device=device), labels, backend=backend)
    result.loss.backward()
    assert result.loss == 0
    assert student.grad.shape == (0, 70)


def test_inputs_do_not_change(backend, make_inputs):
    student, teacher, labels = make_inputs(300, torch.bfloat16)
    copies = student.clone(), teacher.clone(), labels.clone()
    student.requires_grad_()
    distill_loss(student, teacher, labels, backend=backend).loss.backward()
    assert all(torch.equal(now.detach(), before) for now, before in zip((student, teacher, labels), copies))


def test_only_the_loss_carries_a_gradient(backend, make_inputs):
    student, teacher, labels = make_inputs(70)
    result = distill_loss(student.requires_grad_(), teacher, labels, backend=backend)
    assert [value.requires_grad for value in result] == [True, False, False]
    with torch.no_grad():
        assert not distill_loss(student, teacher, labels, backend=backend).loss.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_teacher_of_inference_mode(backend, make_inputs, reduction):
    """And all else that needs no gradient."""
    student, teacher, labels = make_inputs(70)
    student.requires_grad_()
    with torch.inference_mode():
        inferred = [teacher.clone(), labels.clone()]
        temperature = torch.tensor(2.0, device=teacher.device)
    keywords = {"backend": backend, "reduction": reduction}
    loss = distill_loss(student, *inferred, temperature=temperature, **keywords).loss
    expected = distill_loss(student, teacher, labels, temperature=2.0, **keywords).loss
    assert torch.equal(loss, expected)
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (loss, expected)]
    assert torch.equal(*gradients)


def test_inputs_changed_before_the_backward_pass_are_an_error(backend, make_inputs):
    student, teacher, labels = make_inputs(70)
    loss = distill_loss(student.requires_grad_(), teacher, labels, backend=backend).loss
    teacher.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_twice(backend, make_inputs):
    student, teacher, labels = make_inputs(70)
    loss = distill_loss(student.requires_grad_(), teacher, labels, backend=backend).loss
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 200),
    temperature=st.floats(0.5, 8.0),
    scale=st.floats(0.0, 30.0),
    soft_positions=st.sampled_from(["labelled", "all"]),
    ignored=st.sets(st.integers(0, 2)),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_shape(backend, device, reduction, rows, columns, temperature, scale, soft_positions, ignored, seed):
    """What holds whatever comes: the reference's losses and gradient, KL >= 0, a row's gradient that sums to zero."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, columns, generator=generator) * scale for _ in range(2))
    labels = torch.randint(0, columns, (rows,), generator=generator)
    for row in ignored:
        labels[row:][:1] = -100
    keywords = {"temperature": temperature, "soft_positions": soft_positions, "reduction": reduction}
    exact_student = student.double().requires_grad_()
    exact = reference_distill_loss(exact_student, teacher, labels, **keywords)
    exact[0].sum().backward()
    student = student.to(device).requires_grad_()
    result = distill_loss(student, teacher.to(device), labels.to(device), backend=backend, **keywords)
    result.loss.sum().backward()
    for ours, theirs in zip(result, exact):
        torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.grad.cpu().double(), exact_student.grad, rtol=1e-4, atol=1e-6)
    assert (result.soft >= 0).all()
    assert student.grad.sum(1).abs().max() <= 1e-5
