"""The linear form, chunked and without logits, against the fp64 reference with fp64 products.

In 16 bits the measure is the error of torch's own losses on torch's own products, as in test_exactness.py. In fp32 the
error is mostly that of the order in which products are summed. cuBLAS and MKL choose it by the shape, so it is another
one for a chunk than for all rows. There the measure is the plainest order, one term after another: its partial sums are
the longest, and no other order loses more. What is ours is compared apart from that, where products are exact.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from dwt_kernels import DistillLoss, distill_loss, linear_distill_loss
from dwt_kernels.reference import reference_distill_loss
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("hidden", "weight", "bias")

# Enough to average the luck of rounding out, but for the interpreter, which takes its time.
DEFAULT_ROWS, DEFAULT_COLUMNS = (2000 if torch.cuda.is_available() else 600), 2000
if os.environ.get("TRITON_INTERPRET") == "1":
    DEFAULT_ROWS, DEFAULT_COLUMNS = 12, 90

# Fewer errors than this are luck, and compared within a tolerance.
FEWEST_ELEMENTS = 10 if os.environ.get("TRITON_INTERPRET") == "1" else 100


class Heads(NamedTuple):
    student: list[Tensor | None]
    teacher: list[Tensor | None]
    labels: Tensor


@pytest.fixture
def make_heads(device) -> Callable[..., Heads]:
    """Student (N, H_s), (V, H_s), (V,); teacher the same with H_t; labels (N,).

    The comparisons of errors need every row labelled: with fewer rows the products of torch's own gradients would round
    differently from ours.
    """

    def make(
        rows: int = DEFAULT_ROWS,
        columns: int = DEFAULT_COLUMNS,
        widths: tuple[int, int] = (24, 40),
        dtype: torch.dtype = torch.float32,
        bias: bool = True,
        ignored: bool = False,
        seed: int = 0,
    ) -> Heads:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        heads = [[normal(rows, width), normal(columns, width) / width**0.5, normal(columns)] for width in widths]
        for head in heads:
            head[2] = head[2] if bias else None
        labels = torch.randint(0, columns, (rows,), generator=generator)
        if ignored:
            labels[1::3] = -100
        return Heads(*heads, labels.to(device))

    return make


@pytest.fixture(params=["chunked", "logit_free"])
def mode(request, backend) -> dict[str, Any]:
    """Keywords that choose a form; the last chunk is smaller than the others."""
    if request.param == "logit_free":
        if backend == "torch":
            pytest.skip("logit_free is Triton's")
        return {"backend": backend, "memory": "logit_free"}
    return {"backend": backend, "memory": "chunked", "chunk_rows": DEFAULT_ROWS // 5 * 2 + 1}


def with_gradients(
    function: Callable[..., tuple[Tensor, ...]],
    heads: Heads,
    upstream: float,
    dtype: torch.dtype | None,
    **keywords: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """(loss, hard, soft) and the gradients of student hidden, weight and, where there is one, bias."""
    leaves = [
        None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        for tensor in heads.student
    ]
    teacher = [None if tensor is None else tensor.to(dtype or tensor.dtype) for tensor in heads.teacher]
    results = function(*leaves, *teacher, heads.labels, **keywords)
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad((results[0] * upstream).sum(), wanted)
    return [result.detach() for result in results], list(gradients)


def reference(*arguments: Any, **keywords: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels = arguments
    teacher = None if teacher_hidden is None else F.linear(teacher_hidden, teacher_weight, teacher_bias)
    return reference_distill_loss(F.linear(hidden, weight, bias), teacher, labels, **keywords)


class ProductInOrder(torch.autograd.Function):
    """left (n, k) @ right (m, k).T, and in the backward pass the two products like it, by ``sums_in_order``."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return sums_in_order(left, right.t())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return sums_in_order(upstream, right), sums_in_order(upstream.t(), left)


def sums_in_order(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, every sum one term after another, with a rounding for each product and each addition."""
    total = left.new_zeros(left.shape[0], right.shape[1])
    term = torch.empty_like(total)
    for column, row in zip(left.t().contiguous(), right.contiguous()):
        total += torch.mul(column.unsqueeze(1), row, out=term)
    return total


def linear_in_order(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``; the bias is one more term, so that its gradient is summed in order too."""
    if bias is not None:
        hidden = torch.cat([hidden, hidden.new_ones(hidden.shape[0], 1)], 1)
        weight = torch.cat([weight, bias.unsqueeze(1)], 1)
    return ProductInOrder.apply(hidden, weight)


@pytest.fixture
def assert_exact_linear(torch_loss, within_torch_error) -> Callable[..., None]:
    def check(
        heads: Heads,
        mode: dict[str, Any],
        upstream: float = 1.0,
        linear: Callable[..., Tensor] | None = None,
        compared: tuple[str, ...] = NAMES,
        **keywords: Any,
    ) -> None:
        """``linear`` makes the logits of torch's own losses; ``compared``: the gradients to look at."""
        if linear is None:
            linear = linear_in_order if heads.student[0].dtype == torch.float32 else F.linear

        def eager(*arguments: Any, **keywords: Any) -> tuple[Tensor, ...]:
            hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels = arguments
            teacher = None if teacher_hidden is None else linear(teacher_hidden, teacher_weight, teacher_bias)
            return torch_loss(linear(hidden, weight, bias), teacher, labels, **keywords)

        results, gradients = with_gradients(linear_distill_loss, heads, upstream, None, **mode, **keywords)
        eager_results, eager_gradients = with_gradients(eager, heads, upstream, None, **keywords)
        exact_results, exact_gradients = with_gradients(reference, heads, upstream, torch.float64, **keywords)
        for name, *values in zip(NAMES, gradients, eager_gradients, exact_gradients):
            assert values[0].dtype == heads.student[0].dtype
            if name not in compared:
                continue
            if values[0].numel() < FEWEST_ELEMENTS:
                torch.testing.assert_close(values[0].double(), values[2], rtol=1e-4, atol=1e-4)
            else:
                within_torch_error(f"gradient of {name}", *values)
        if keywords.get("reduction") == "none":
            for name, *values in zip(DistillLoss._fields, results, eager_results, exact_results):
                within_torch_error(name, *values)
        else:
            tolerance = 1e-6 if heads.student[0].dtype == torch.float32 else 1e-2
            torch.testing.assert_close(
                [value.double() for value in results], exact_results, rtol=tolerance, atol=tolerance
            )

    return check


def scaled_permutation(size: int, generator: torch.Generator) -> Tensor:
    """(size, size); in each row and column one power of 2 and zeros: a product with it is exact."""
    powers = torch.randint(-1, 2, (size,), generator=generator).float().exp2()
    return torch.diag(powers)[torch.randperm(size, generator=generator)]


@pytest.mark.parametrize("exact", ["hidden", "weight"])
def test_where_products_are_exact(mode, device, assert_exact_linear, exact):
    """Where no order of sums matters, losses and the gradient of the other factor are as exact as those of logits."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = DEFAULT_ROWS, min(DEFAULT_COLUMNS, 300)
    heads = []
    for _ in range(2):
        if exact == "hidden":
            hidden, weight = scaled_permutation(rows, generator), torch.randn(columns, rows, generator=generator) * 3
        else:
            hidden, weight = torch.randn(rows, columns, generator=generator) * 3, scaled_permutation(columns, generator)
        heads.append([hidden.to(device), weight.to(device), None])
    labels = torch.randint(0, columns, (rows,), generator=generator).to(device)
    compared = ("weight",) if exact == "hidden" else ("hidden",)
    keywords = {"temperature": 2.0, "reduction": "none"}
    assert_exact_linear(Heads(*heads, labels), mode, linear=F.linear, compared=compared, **keywords)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_reference(mode, make_heads, assert_exact_linear, dtype, reduction):
    assert_exact_linear(make_heads(dtype=dtype), mode, temperature=2.0, reduction=reduction)


@pytest.mark.parametrize("upstream", [0.7, 3.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_upstream_gradient_that_is_no_power_of_2(mode, make_heads, assert_exact_linear, dtype, upstream):
    """Within the same bound, whose lower end is half a unit in the last place, u, of every element.

    There are four roundings: of the gradient of logits, on a CPU in bf16 of a chunk's share of dW, of the sum, and of
    its product with the upstream gradient, which torch's has not. Each moves an element by at most u, evenly spread, so
    that its norm is u / sqrt(3) of the gradient's where every element is a power of 2, and less elsewhere. They are
    independent: sqrt(4 / 3) u at most.
    """
    assert_exact_linear(make_heads(dtype=dtype), mode, upstream=upstream, temperature=2.0)


@pytest.mark.parametrize("keywords", [
    {"soft_positions": "all", "temperature": 1.7, "temperature_squared": True},
    {"normalizer": (3.0, 5.0), "hard_weight": 0.7, "soft_weight": 1.3},
    {"vocab_size": DEFAULT_COLUMNS - 7, "temperature": 2.5},
    {"hard_weight": 0.0},
    {"soft_weight": 0.0},
], ids=str)  # fmt: skip
def test_keywords(mode, make_heads, assert_exact_linear, keywords):
    heads = make_heads()
    heads.labels.remainder_(DEFAULT_COLUMNS - 7)
    assert_exact_linear(heads, mode, upstream=-3.7, **keywords)


@pytest.mark.parametrize(
    ("rows", "columns", "widths"),
    [(1, 1, (1, 1)), (DEFAULT_ROWS, 2, (5, 3)), (DEFAULT_ROWS, 301, (65, 17)), (DEFAULT_ROWS, 601, (9, 8))],
)
def test_sizes(mode, make_heads, assert_exact_linear, rows, columns, widths):
    heads = make_heads(rows, columns, widths)
    heads.labels[0] = 0
    assert_exact_linear(heads, mode, reduction="none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_vocabulary_that_is_no_multiple_of_8(mode, make_heads, assert_exact_linear, dtype):
    """On a GPU its products are made in two parts."""
    assert_exact_linear(make_heads(columns=DEFAULT_COLUMNS + 3, widths=(32, 40), dtype=dtype), mode, temperature=2.0)


def test_no_bias(mode, make_heads, assert_exact_linear):
    assert_exact_linear(make_heads(bias=False), mode)


def test_hard_only(mode, make_heads, assert_exact_linear):
    heads = make_heads()
    assert_exact_linear(heads._replace(teacher=[None, None, None]), mode)


def test_auto_is_the_same_loss(backend, make_heads, assert_exact_linear):
    assert_exact_linear(make_heads(), {"backend": backend, "memory": "auto"}, temperature=2.0)


def test_chunk_rows_does_not_change_the_loss(backend, make_heads):
    heads = make_heads()
    chunked = [
        with_gradients(linear_distill_loss, heads, 1.0, None, backend=backend, memory="chunked", chunk_rows=rows)
        for rows in (1, 3, DEFAULT_ROWS, 1000, None)
    ]
    for each in chunked[1:]:
        torch.testing.assert_close(each, chunked[0], rtol=1e-5, atol=1e-6)


def test_agrees_with_the_logits_form(mode, make_heads):
    heads = make_heads()
    logits, teacher_logits = (F.linear(*head) for head in heads[:2])
    keywords = {"temperature": 1.5, "reduction": "none", "backend": mode["backend"]}
    expected = distill_loss(logits, teacher_logits, heads.labels, **keywords)
    result = linear_distill_loss(*heads.student, *heads.teacher, heads.labels, **{**keywords, **mode})
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_row_counts(mode, make_heads, reduction):
    heads = make_heads()
    heads.labels.fill_(-100)
    results, gradients = with_gradients(linear_distill_loss, heads, 1.0, None, reduction=reduction, **mode)
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


def test_no_row_counts_with_automatic_chunks(backend, make_heads):
    heads = make_heads()
    heads.labels.fill_(-100)
    results, gradients = with_gradients(linear_distill_loss, heads, 1.0, None, backend=backend)
    assert all((value == 0).all() for value in (*results, *gradients))


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


def test_fp16_gradients_below_its_range_survive_with_a_loss_scale(mode, make_heads, assert_exact_linear):
    """1 / 1e6 of a probability is no fp16 number; the gradients wait for the loss scale before they are rounded."""
    heads = make_heads(dtype=torch.float16)
    assert_exact_linear(heads, mode, upstream=65536.0, normalizer=1e6)


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


def test_backward_twice_and_scaled(mode, make_heads):
    heads = make_heads()
    heads.student[1].requires_grad_()
    loss = linear_distill_loss(*heads.student, *heads.teacher, heads.labels, **mode).loss
    first, second = (torch.autograd.grad(loss * scale, heads.student[1], retain_graph=True)[0] for scale in (1.0, 2.0))
    torch.testing.assert_close(second, 2 * first)


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
