"""The linear form, chunked and without logits, against the fp64 reference with fp64 products.

In 16 bits the measure is the error of torch's own losses on torch's own products, as in test_exactness.py. In fp32 the
error is mostly that of the order in which products are summed. cuBLAS and MKL choose it by the shape, so it is another
one for a chunk than for all rows. There the measure is the plainest order, one term after another: its partial sums are
the longest, and no other order loses more. What is ours is compared apart from that, where products are exact.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dwt_kernels import DistillLoss, linear_distill_loss
from linear_cases import DEFAULT_COLUMNS, DEFAULT_ROWS, DTYPES, Heads, reference, with_gradients
from torch import Tensor

NAMES = ("hidden", "weight", "bias")

# Fewer errors than this are luck, and compared within a tolerance.
FEWEST_ELEMENTS = 10 if os.environ.get("TRITON_INTERPRET") == "1" else 100


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


def test_fp16_gradients_below_its_range_survive_with_a_loss_scale(mode, make_heads, assert_exact_linear):
    """1 / 1e6 of a probability is no fp16 number; the gradients wait for the loss scale before they are rounded."""
    heads = make_heads(dtype=torch.float16)
    assert_exact_linear(heads, mode, upstream=65536.0, normalizer=1e6)
