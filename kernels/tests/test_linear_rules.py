"""The linear form apart from its exactness: which rows and gradients count, what it leaves alone, what it refuses."""

from __future__ import annotations

import pytest
import torch
from dwt_kernels import linear_distill_loss
from linear_cases import DEFAULT_ROWS, DTYPES, Heads, reference, with_gradients


def test_chunk_rows_does_not_change_the_loss(backend, make_heads):
    heads = make_heads()
    chunked = [
        with_gradients(linear_distill_loss, heads, 1.0, None, backend=backend, memory="chunked", chunk_rows=rows)
        for rows in (1, 3, DEFAULT_ROWS, 1000, None)
    ]
    for each in chunked[1:]:
        torch.testing.assert_close(each, chunked[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_row_counts(mode, make_heads, reduction):
    heads = make_heads()
    heads.labels.fill_(-100)
    for chosen in (mode, {"backend": mode["backend"]}):  # as asked for, and in automatic chunks
        results, gradients = with_gradients(linear_distill_loss, heads, 1.0, None, reduction=reduction, **chosen)
        assert all((value == 0).all() for value in (*results, *gradients))


def test_columns_excluded_by_both_models_in_different_ways(mode, make_heads):
    """By their biases, -inf in the student's, very low in the teacher's; the first tile has no other columns."""
    heads = make_heads(columns=300)
    kept = slice(200, 300)
    heads.labels.remainder_(100)
    without = Heads(*([hidden, weight[kept], bias[kept]] for hidden, weight, bias in heads[:2]), heads.labels)
    heads.student[2][:200], heads.teacher[2][:200] = float("-inf"), -1e4
    heads = heads._replace(labels=heads.labels + 200)
    results, gradients = with_gradients(linear_distill_loss, heads, 1.0, None, temperature=2.0, **mode)
    expected, expected_gradients = with_gradients(linear_distill_loss, without, 1.0, None, temperature=2.0, **mode)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(gradients[0], expected_gradients[0])
    torch.testing.assert_close([each[kept] for each in gradients[1:]], expected_gradients[1:])
    assert not any(each[:200].any() for each in gradients[1:])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_that_do_not_count_may_hold_anything(mode, make_heads, reduction):
    heads = make_heads(ignored=True)
    counted = heads.labels != -100
    without = Heads(*([head[0][counted], *head[1:]] for head in heads[:2]), heads.labels[counted])
    heads.student[0][~counted], heads.teacher[0][~counted] = float("nan"), float("inf")
    keywords = {"temperature": 2.0, "reduction": reduction, **mode}
    results, gradients = with_gradients(linear_distill_loss, heads, -3.7, None, **keywords)
    expected, expected_gradients = with_gradients(linear_distill_loss, without, -3.7, None, **keywords)
    assert (gradients[0][~counted] == 0).all()
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-7)
    compared = [gradients[0][counted], *gradients[1:]]
    torch.testing.assert_close(compared, expected_gradients, rtol=1e-5, atol=1e-6)


def test_ignored_rows_in_the_losses_of_rows(mode, make_heads):
    heads = make_heads(ignored=True)
    keywords = {"temperature": 2.0, "reduction": "none", **mode}
    results, gradients = with_gradients(linear_distill_loss, heads, 1.0, None, **keywords)
    exact, exact_gradients = with_gradients(reference, heads, 1.0, torch.float64, temperature=2.0, reduction="none")
    assert all((value[1::3] == 0).all() for value in (*results, gradients[0]))
    torch.testing.assert_close([each.double() for each in results], exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close([each.double() for each in gradients], exact_gradients, rtol=1e-4, atol=1e-4)


def test_only_wanted_gradients_are_made(mode, make_heads):
    heads = make_heads()
    heads.student[1].requires_grad_()
    linear_distill_loss(*heads.student, *heads.teacher, heads.labels, **mode).loss.backward()
    assert heads.student[1].grad is not None
    assert heads.student[0].grad is None
    assert heads.student[2].grad is None
    with torch.no_grad():
        assert not linear_distill_loss(*heads.student, *heads.teacher, heads.labels, **mode).loss.requires_grad


def test_inputs_do_not_change(mode, make_heads):
    heads = make_heads()
    copies = [tensor.clone() for tensor in (*heads.student, *heads.teacher)]
    with_gradients(linear_distill_loss, heads, 1.0, None, **mode)
    assert all(torch.equal(now, before) for now, before in zip((*heads.student, *heads.teacher), copies))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_twice_and_scaled(mode, make_heads, dtype):
    heads = make_heads(8, 50, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in heads.student]
    loss = linear_distill_loss(*leaves, *heads.teacher, heads.labels, **mode).loss
    first, second = (torch.autograd.grad(loss * scale, leaves, retain_graph=True) for scale in (1.0, 2.0))
    torch.testing.assert_close(second, tuple(2 * gradient for gradient in first))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_teacher_of_inference_mode(mode, make_heads, reduction):
    """And all else that needs no gradient."""
    heads = make_heads()
    with torch.inference_mode():
        inferred = Heads(heads.student, [each.clone() for each in heads.teacher], heads.labels.clone())
    results, gradients = with_gradients(linear_distill_loss, inferred, 1.0, None, reduction=reduction, **mode)
    expected, expected_gradients = with_gradients(linear_distill_loss, heads, 1.0, None, reduction=reduction, **mode)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_differentiation_is_an_error(mode, make_heads, dtype, reduction):
    """Not a gradient without its second-order part. ``create_graph`` alone, which some training loops set, is none."""
    heads = make_heads(dtype=dtype)
    wanted = [tensor.requires_grad_() for tensor in heads.student]
    loss = linear_distill_loss(*wanted, *heads.teacher, heads.labels, reduction=reduction, **mode).loss.sum()
    expected = torch.autograd.grad(loss, wanted, retain_graph=True)
    gradients = torch.autograd.grad(loss, wanted, create_graph=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if mode["memory"] == "logit_free" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close([gradient.detach() for gradient in gradients], list(expected), **tolerance)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="linear_distill_loss has no second derivative"):
            (loss + 10 * gradient.pow(2).sum()).backward(retain_graph=True)


def test_autocast(mode, make_heads, device):
    """Under autocast the products are in its dtype, the gradients in the parameters', the losses fp32."""
    heads = make_heads()
    low = Heads(*([None if t is None else t.bfloat16() for t in head] for head in heads[:2]), heads.labels)
    low.student[2], low.teacher[2] = heads.student[2], heads.teacher[2]
    expected = linear_distill_loss(*low.student, *low.teacher, heads.labels, **mode)
    with torch.autocast(device, dtype=torch.bfloat16):
        results, gradients = with_gradients(linear_distill_loss, heads, 1.0, None, **mode)
    torch.testing.assert_close(results, [value.detach() for value in expected])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_logit_free_needs_triton(make_heads):
    heads = make_heads()
    with pytest.raises(ValueError, match="logit_free"):
        linear_distill_loss(*heads.student, *heads.teacher, heads.labels, backend="torch", memory="logit_free")


def test_logit_free_refuses_to_be_deterministic(backend, make_heads):
    if backend == "torch":
        pytest.skip("logit_free is Triton's")
    heads = make_heads()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            linear_distill_loss(*heads.student, *heads.teacher, heads.labels, backend=backend, memory="logit_free")
    finally:
        torch.use_deterministic_algorithms(False)
