"""What the kernels' tests share: backends, inputs, and the comparison with the fp64 reference.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is first imported:
test_in_interpreter.py starts a process for them, and there ``backend`` is "triton" only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import linear_cases
import pytest
import torch
import torch.nn.functional as F
from dwt_kernels import DistillLoss
from dwt_kernels.arguments import Objective, resolve_objective
from dwt_kernels.reference import reference_distill_loss, reference_reduction
from linear_cases import Heads
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if HAS_GPU else "cpu"
BACKENDS = ["torch", "triton"] if HAS_GPU else ["triton"] if IN_INTERPRETER else ["torch"]

# How much larger than torch's own error in the same dtype ours may be. The interpreter truncates where hardware rounds.
ERROR_RATIO = 2.2 if IN_INTERPRETER else 1.1

# Enough rows to average the luck of rounding out: with 1,000 of them two equally good computations still differ by some
# 5%, with the 30 that the interpreter has time for (10 ms each) by 25%. A GPU's sums leave so few errors that ours and
# torch's are equally good there, so it gets 2,000 rows of any size. On a CPU torch's sums over long rows lose most.
MOST_ROWS, MOST_LOGITS = (30, 2**15) if IN_INTERPRETER else (2000, 2**24) if HAS_GPU else (1000, 2**19)
LEAST_ROWS = 4

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., Inputs]:
    """Student logits (N, V), teacher logits (N, V), labels (N,); every third row ignored, -100."""

    def make(
        columns: int, dtype: torch.dtype = torch.float32, rows: int | None = None, scale: float = 3.0, seed: int = 0
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        if rows is None:
            rows = max(LEAST_ROWS, min(MOST_ROWS, MOST_LOGITS // columns))
        student, teacher = (torch.randn(rows, columns, generator=generator) * scale for _ in range(2))
        labels = torch.randint(0, columns, (rows,), generator=generator)
        labels[1::3] = -100
        return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype), labels.to(DEVICE)

    return make


@pytest.fixture(scope="session")
def make_objective() -> Callable[..., Objective]:
    """``Objective`` with the public functions' defaults, but for the keywords given."""

    def make(*, device: str = DEVICE, **keywords: Any) -> Objective:
        defaults = {
            "temperature": 1.0,
            "hard_weight": 1.0,
            "soft_weight": 1.0,
            "ignore_index": -100,
            "soft_positions": "labelled",
            "temperature_squared": False,
            "normalizer": None,
            "reduction": "mean",
            "backend": "auto",
        }
        return resolve_objective(torch.device(device), **{**defaults, **keywords})

    return make


@pytest.fixture(scope="session")
def make_heads() -> Callable[..., Heads]:
    return partial(linear_cases.make_heads, DEVICE)


@pytest.fixture(params=["chunked", "logit_free"])
def mode(request, backend) -> dict[str, Any]:
    """Keywords that choose a form; the last chunk is smaller than the others."""
    if request.param == "logit_free":
        if backend == "torch":
            pytest.skip("logit_free is Triton's")
        return {"backend": backend, "memory": "logit_free"}
    return {"backend": backend, "memory": "chunked", "chunk_rows": linear_cases.DEFAULT_ROWS // 5 * 2 + 1}


@pytest.fixture(scope="session")
def assert_exact() -> Callable[..., None]:
    return assert_as_exact_as_torch


@pytest.fixture(scope="session")
def torch_loss() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch_distill_loss


@pytest.fixture(scope="session")
def within_torch_error() -> Callable[..., None]:
    return assert_within_torch_error


def assert_as_exact_as_torch(
    loss_function: Callable[..., DistillLoss],
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    backend: str,
    upstream: float = 1.0,
    **keywords: Any,
) -> None:
    """Rows and gradient against the fp64 reference, by torch's own error; the reduction against the rows."""
    plain = {name: _number(value) for name, value in keywords.items()}
    results, gradient = _with_gradient(loss_function, student, teacher, labels, upstream, backend=backend, **keywords)
    _, exact_gradient = _with_gradient(reference_distill_loss, student.double(), teacher, labels, upstream, **plain)
    _, torch_gradient = _with_gradient(torch_distill_loss, student, teacher, labels, upstream, **plain)
    assert gradient.dtype == student.dtype
    assert_within_torch_error("gradient", gradient, torch_gradient, exact_gradient)

    by_row = {**plain, "reduction": "none"}
    rows = loss_function(student, teacher, labels, backend=backend, **{**keywords, "reduction": "none"})
    exact_rows = reference_distill_loss(student.double(), teacher, labels, **by_row)
    torch_rows = torch_distill_loss(student, teacher, labels, **by_row)
    for name, ours, theirs, exact in zip(DistillLoss._fields, rows, torch_rows, exact_rows):
        assert_within_torch_error(name, ours, theirs, exact)

    parts = {name: plain[name] for name in REDUCTION_KEYWORDS if name in plain}
    reduced = reference_reduction(rows.hard.double(), rows.soft.double(), labels, **{**REDUCTION_KEYWORDS, **parts})
    for ours, exact in zip(results, reduced):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=2.0**-23, atol=2.0**-23)


REDUCTION_KEYWORDS = {
    "hard_weight": 1.0,
    "soft_weight": 1.0,
    "ignore_index": -100,
    "soft_positions": "labelled",
    "normalizer": None,
    "reduction": "mean",
}


def torch_distill_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, **keywords: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same objective from torch's own losses, on fp32 upcasts of the logits: what everybody writes."""
    temperature, ignore_index = keywords.get("temperature", 1.0), keywords.get("ignore_index", -100)
    vocab_size = keywords.get("vocab_size")
    student = student_logits[:, :vocab_size].float()
    hard = F.cross_entropy(student, labels, ignore_index=ignore_index, reduction="none")
    soft = torch.zeros_like(hard)
    if teacher_logits is not None:
        teacher = teacher_logits[:, :vocab_size].float()
        teacher_probability = F.softmax(teacher / temperature, 1)
        soft = F.kl_div(F.log_softmax(student / temperature, 1), teacher_probability, reduction="none").sum(1)
    if keywords.get("temperature_squared"):
        soft = soft * temperature**2
    parts = {name: keywords[name] for name in REDUCTION_KEYWORDS if name in keywords}
    return reference_reduction(hard, soft, labels, **{**REDUCTION_KEYWORDS, **parts})


def _with_gradient(
    function: Callable[..., tuple[Tensor, ...]],
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    upstream: float,
    **keywords: Any,
) -> tuple[tuple[Tensor, ...], Tensor]:
    student = student.detach().requires_grad_()
    results = function(student, teacher, labels, **keywords)
    loss = results[0]
    # With "none" every row has another upstream gradient.
    rows = torch.arange(1, loss.numel() + 1, device=loss.device, dtype=loss.dtype) if loss.dim() else 1.0
    (gradient,) = torch.autograd.grad((loss * upstream * rows).sum(), student)
    return tuple(result.detach() for result in results), gradient


def assert_within_torch_error(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """The norm of ``ours``' error is at most ERROR_RATIO that of ``theirs``, or the largest of one rounding."""
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    error = (ours.double() - exact).norm()
    # One rounding of the exact result is not an error.
    rounding = torch.finfo(ours.dtype).eps / 2 * exact.norm()
    allowed = ERROR_RATIO * max((theirs.double() - exact).norm(), rounding)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def _number(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_number(each) for each in value)
    return value.item() if isinstance(value, Tensor) else value
