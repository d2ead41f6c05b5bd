"""How kernels are started: on their tensors' GPU, and compiled for few of the values that change from call to call."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from dwt_kernels import distill_loss, linear_distill_loss
from dwt_kernels.layout import Labels
from dwt_kernels.linear_chunked import Head
from torch import Tensor

triton = pytest.importorskip("triton")

KERNELS = {
    "prepare_kernel",
    "statistics_kernel",
    "losses_kernel",
    "reduce_kernel",
    "scale_kernel",
    "terms_kernel",
    "gradient_kernel",
    "tile_statistics_kernel",
    "merge_kernel",
    "tile_gradient_kernel",
}


def run_every_kernel(device: str) -> list[Tensor]:
    """Losses and gradients of the logits form and of both linear ones."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 40, generator=generator).to(device) for _ in range(2))
    weight, labels = torch.eye(40, device=device), torch.arange(5, device=device)
    student.requires_grad_()
    losses = [distill_loss(student, teacher, labels, backend="triton").loss]
    for memory in ("chunked", "logit_free"):
        heads = (student, weight, None, teacher, weight, None)
        losses.append(linear_distill_loss(*heads, labels, backend="triton", memory=memory).loss)
    return [*losses, *torch.autograd.grad(sum(losses), student)]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="watches the interpreter's launches")
def test_every_launch_is_on_its_tensors_device(monkeypatch):
    guarded: list[Tensor] = []
    launches: list[tuple[str, bool]] = []

    class Guard:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __enter__(self) -> None:
            guarded.append(self.tensor)

        def __exit__(self, *_: Any) -> None:
            guarded.pop()

    executor = triton.runtime.interpreter.GridExecutor
    call = executor.__call__

    def recording(self: Any, *arguments: Any, **keywords: Any) -> Any:
        launches.append((self.fn.__name__, any(tensor is argument for tensor in guarded for argument in arguments)))
        return call(self, *arguments, **keywords)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(executor, "__call__", recording)
    run_every_kernel("cpu")
    assert {name for name, _ in launches} == KERNELS
    assert all(on_device for _, on_device in launches)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    assert torch.cuda.current_device() == 0
    for ours, expected in zip(run_every_kernel("cuda:1"), run_every_kernel("cuda:0")):
        assert ours.device.index == 1
        torch.testing.assert_close(ours.to("cuda:0"), expected, rtol=1e-5, atol=1e-6)


def test_rows_are_loaded_by_the_element_where_a_matrix_begins_within_16_bytes():
    """Triton then loads no wider, and with more neighbours in a thread it would move them between threads."""
    from dwt_kernels.on_triton.launch import row_tile

    student, teacher = (torch.empty(5, 30522, dtype=torch.bfloat16) for _ in range(2))
    assert row_tile(student, teacher).width == row_tile(student[4:], None).width == 8
    assert row_tile(student[1:], teacher).width == row_tile(student, teacher[1:]).width == 1


@pytest.fixture
def precision(monkeypatch):
    """Torch's precision of fp32 products, which a test may change."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_precision_of_products_without_logits_is_torchs(monkeypatch, precision, dtype):
    """However it is set. After the new setting torch refuses to be asked the old way, whatever the heads' dtype."""
    from dwt_kernels import logit_free

    used: dict[str, Any] = {}
    monkeypatch.setattr(logit_free, "launch", lambda *_, **constants: used.update(constants))
    head = Head(torch.zeros(3, 1, dtype=dtype), torch.zeros(9, 1, dtype=dtype), None)
    labels, one = Labels(torch.arange(3), -100, False), torch.ones(())

    def precision_used() -> str:
        logit_free.logit_free_statistics_and_gradients(head, None, labels, one, one, [False] * 3)
        return used["PRECISION"]

    assert precision_used() == "ieee"
    precision.fp32_precision = "tf32"
    assert precision_used() == "tf32"
    precision.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("high")
    assert precision_used() == "tf32"


def test_few_kernels_for_any_number_of_rows(monkeypatch):
    """Without logits in memory the columns' shares depend on the rows; what is compiled must not."""
    from dwt_kernels import logit_free

    compiled = set()

    def record(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        compiled.add((kernel.fn.__name__, *sorted(constants.items())))

    monkeypatch.setattr(logit_free, "launch", record)
    monkeypatch.setattr(logit_free, "processors", lambda device: 132)
    weight, one = torch.zeros(30522, 1), torch.ones(())
    for rows in range(1, 5000, 13):
        labels = Labels(torch.zeros(rows, dtype=torch.int64), -100, False)
        heads = [Head(torch.zeros(rows, 1), weight, None) for _ in range(2)]
        logit_free.logit_free_statistics_and_gradients(*heads, labels, one, one, [True, True, False])
    assert len(compiled) <= 2 + 3
