"""Under torch.compile the loss is one operator each way; under autocast it does not mind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dwt_kernels import distill_loss, linear_distill_loss
from torch import Tensor


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def inputs(device: str, rows: int = 6, columns: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, columns, generator=generator).to(device) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(0, columns, (rows,), generator=generator).to(device)


def compiled_graphs(
    function: Callable[..., Any], dynamic: bool | None = None
) -> tuple[Callable[..., Any], list[list[str]]]:
    """``function`` compiled whole, and the operators of every graph made for it, forward and backward."""
    graphs: list[list[str]] = []

    def record(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    from torch._dynamo.backends.common import aot_autograd

    recorder = aot_autograd(fw_compiler=record, bw_compiler=record)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=recorder), graphs


def test_one_operator_each_way(device):
    student, teacher, labels = inputs(device)
    compiled, graphs = compiled_graphs(lambda *tensors: distill_loss(*tensors, temperature=2.0).loss)
    loss = compiled(student, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = distill_loss(student, teacher, labels, temperature=2.0).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])
    ours = [[name for name in graph if "dwt_kernels" in name] for graph in graphs]
    assert ours == [["dwt_kernels.distill.default"], ["dwt_kernels.distill_backward.default"]]
    assert not any("softmax" in name or "exp" in name for graph in graphs for name in graph)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_form_is_one_operator(device, reduction):
    student, teacher, labels = inputs(device)
    weight = torch.eye(40, device=device).requires_grad_()

    def loss_of(hidden: Tensor, weight: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        teacher_weight = torch.eye(40, device=hidden.device)
        result = linear_distill_loss(hidden, weight, None, teacher, teacher_weight, None, labels, reduction=reduction)
        return result.loss.sum()

    compiled, graphs = compiled_graphs(loss_of)
    loss = compiled(student, weight, teacher, labels)
    gradients = torch.autograd.grad(loss, [student, weight])
    expected = loss_of(student, weight, teacher, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [student, weight]))
    assert [name for name in graphs[0] if "dwt_kernels" in name] == ["dwt_kernels.linear_distill.default"]


def test_values_of_scalar_tensors_do_not_recompile(device):
    student, teacher, labels = inputs(device)

    def loss_of(student: Tensor, weight: Tensor, temperature: Tensor, count: Tensor) -> Tensor:
        return distill_loss(
            student, teacher, labels, soft_weight=weight, temperature=temperature, normalizer=(count, count)
        ).loss

    compiled, graphs = compiled_graphs(loss_of)
    for step in range(1, 5):
        scalars = [torch.tensor(float(step + offset), device=device) for offset in range(3)]
        torch.testing.assert_close(compiled(student, *scalars), loss_of(student, *scalars))
    assert len(graphs) == 1


@pytest.mark.parametrize("linear", [False, True])
def test_changing_number_of_rows(backend, device, linear):
    """One graph each way for any number of rows. Also run in the interpreter, for the back end "triton"."""

    def loss_of(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        keywords = {"temperature": 2.0, "backend": backend}
        if linear:
            eye = torch.eye(40, device=student.device)
            return linear_distill_loss(student, eye, None, teacher, eye, None, labels, **keywords).loss
        return distill_loss(student, teacher, labels, **keywords).loss

    compiled, graphs = compiled_graphs(loss_of, dynamic=True)
    for rows in (6, 9, 14):
        student, teacher, labels = inputs(device, rows)
        loss, expected = compiled(student, teacher, labels), loss_of(student, teacher, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))
    assert len(graphs) == 2


@pytest.mark.slow
def test_inductor_compiles_it(device):
    """With the default backend, in a model whose logits are made and whose loss is used on."""
    student, teacher, labels = inputs(device)
    step = torch.compile(lambda s, t, y: distill_loss(s * 2, t, y).loss * 3, fullgraph=True)
    loss = step(student, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = distill_loss(student * 2, teacher, labels).loss * 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("operator", ["distill", "linear_distill"])
def test_operators_pass_opcheck(device, operator):
    student, teacher, labels = inputs(device)
    scalars = [torch.ones((), device=device) for _ in range(3)]
    objective = (*scalars, None, None, -100, False, False, "mean", "torch")
    if operator == "distill":
        arguments = (student, teacher, labels, 40, *objective)
    else:
        heads = (student, torch.eye(40, device=device).requires_grad_(), None)
        teacher_heads = (teacher, torch.eye(40, device=device), None)
        arguments = (*heads, *teacher_heads, labels, 40, None, "chunked", [True, True, False], *objective)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.dwt_kernels, operator).default, arguments, test_utils=tests)


def test_autocast_computes_in_fp32(device):
    """Logits of a linear layer under autocast are bf16; the loss and its inside are fp32, the gradient bf16."""
    student, teacher, labels = inputs(device)
    weight = torch.eye(40, device=device).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = F.linear(student, weight)
        result = distill_loss(logits, F.linear(teacher, weight).detach(), labels)
    assert logits.dtype == torch.bfloat16
    assert [value.dtype for value in result] == [torch.float32] * 3
    torch.testing.assert_close(result, distill_loss(logits, teacher.bfloat16(), labels))
    result.loss.backward()
    assert weight.grad.dtype == torch.float32


def loss_of_heads(memory: str | None, student: Tensor, teacher: Tensor, labels: Tensor, **keywords: Any) -> Tensor:
    """Of the logits form (``memory`` None), or of the linear one with biases, in two chunks where it has any."""
    if memory is None:
        return distill_loss(student, teacher, labels, **keywords).loss
    eye, bias = torch.eye(40, device=student.device, dtype=student.dtype), student.new_ones(40)
    heads = (student, eye.requires_grad_(), bias.requires_grad_(), teacher, eye.detach(), bias.detach())
    chunk_rows = 4 if memory == "chunked" else None
    return linear_distill_loss(*heads, labels, memory=memory, chunk_rows=chunk_rows, **keywords).loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("memory", [None, "chunked", "logit_free"])
def test_in_a_cuda_graph(memory):
    student, teacher, labels = inputs("cuda")
    student, teacher = student.detach().bfloat16().requires_grad_(), teacher.bfloat16()
    student.grad = torch.zeros_like(student)

    def step() -> Tensor:
        student.grad.zero_()
        loss = loss_of_heads(memory, student, teacher, labels, temperature=2.0)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        student.mul_(2)
    graph.replay()
    replayed, gradient = captured.clone(), student.grad.clone()
    torch.testing.assert_close(replayed, step())
    torch.testing.assert_close(gradient, student.grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: host synchronisation")
@pytest.mark.parametrize("memory", [None, "chunked", "logit_free"])
def test_no_host_synchronisation(memory):
    student, teacher, labels = inputs("cuda")
    scalars = {"temperature": torch.tensor(2.0, device="cuda"), "normalizer": torch.tensor(5.0, device="cuda")}
    loss_of_heads(memory, student, teacher, labels, **scalars).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of_heads(memory, student, teacher, labels, **scalars).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
