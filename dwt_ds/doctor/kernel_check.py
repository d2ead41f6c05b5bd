"""The loss that training computes, on this host's devices, against the formula in fp64."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dwt_ds.base.gpus import gpu_count
from dwt_ds.base.words import one_line

if TYPE_CHECKING:
    from torch import Tensor

# Shares of the largest value. fp32 adds up a few hundred terms a row, bf16 rounds logits and gradients to 8 bits; a
# wrong kernel is off by far more.
_TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}
# Nothing here is a multiple of a kernel's blocks, and the last chunk is smaller than the others.
_ROWS, _COLUMNS, _WIDTHS, _CHUNK_ROWS = 64, 997, (40, 72), 24


def check_kernels() -> list[dict[str, Any]]:
    """One answer a device: its name, the back end that a run uses there, the largest relative error by dtype, and what
    is wrong, if anything.

    On a GPU this compiles the Triton kernels, where there is a Triton; else it is the torch back end.
    """
    import torch

    # NVIDIA's containers let fp32 products be rounded to TF32, which would be taken for the kernels' error.
    torch.set_float32_matmul_precision("highest")
    devices = [f"cuda:{i}" for i in range(gpu_count())] or ["cpu"]
    return [check_device(device, _backend(device)) for device in devices]


def check_device(device: str, backend: str) -> dict[str, Any]:
    """The answer of one device; the torch back end has no logit-free form."""
    errors: dict[str, float] = {}
    problems = []
    for dtype, tolerance in _TOLERANCES.items():
        for memory in ("chunked", "logit_free") if backend == "triton" else ("chunked",):
            try:
                error = _largest_error(device, backend, memory, dtype)
            except Exception as failure:  # whatever a compiler or driver raises is this check's finding
                problems.append(f"{memory} in {dtype}: {one_line(failure, with_type=True)}")
                continue
            errors[dtype] = max(error, errors.get(dtype, 0.0))
            if not error <= tolerance:
                problems.append(f"{memory} in {dtype}: off by {error:.1e} of the reference, {tolerance:.0e} is allowed")
    return {"device": device, "backend": backend, "errors": errors, "problem": "; ".join(problems)}


def _backend(device: str) -> str:
    """What backend="auto" comes to; named, so that a Triton that does not import is an error and not torch."""
    return "triton" if device != "cpu" and find_spec("triton") is not None else "torch"


def _largest_error(device: str, backend: str, memory: str, dtype: str) -> float:
    """Of the loss and the student's gradients, each against the largest value of the reference."""
    import torch
    from dwt_kernels import linear_distill_loss
    from dwt_kernels.reference import reference_distill_loss

    draw = torch.Generator().manual_seed(0)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def head(width: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.randn(_ROWS, width, generator=draw)
        weight = torch.randn(_COLUMNS, width, generator=draw) * 4 / width**0.5
        return hidden.to(kind), weight.to(kind), torch.randn(_COLUMNS, generator=draw).to(kind)

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return hidden.double() @ weight.double().T + bias.double()

    student, teacher = head(_WIDTHS[0]), head(_WIDTHS[1])
    labels = torch.randint(0, _COLUMNS, (_ROWS,), generator=draw)
    labels[::3] = -100
    objective: dict[str, Any] = {"temperature": 2.0, "soft_weight": 3.0}
    exact = [tensor.double().requires_grad_() for tensor in student]
    loss, _, _ = reference_distill_loss(logits(*exact), logits(*teacher), labels, **objective)
    right = [loss, *torch.autograd.grad(loss, exact)]

    hidden, weight, bias = (tensor.to(device).requires_grad_() for tensor in student)
    teacher_hidden, teacher_weight, teacher_bias = (tensor.to(device) for tensor in teacher)
    objective |= {"backend": backend, "memory": memory}
    objective |= {"chunk_rows": _CHUNK_ROWS} if memory == "chunked" else {}
    heads = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    ours = linear_distill_loss(*heads, labels.to(device), **objective)
    mine = [ours.loss, *torch.autograd.grad(ours.loss, [hidden, weight, bias])]
    # Not Python's max, which would lose a NaN.
    return torch.stack([(m.cpu() - r).abs().max() / r.abs().max() for m, r in zip(mine, right)]).max().item()
