"""The loss kernels on this host's devices against the formula in fp64."""

from __future__ import annotations

from typing import Any

# fp32 against fp64 over a few hundred terms a row; a wrong kernel is off by far more.
_TOLERANCE = 1e-4


def check_kernels() -> list[dict[str, Any]]:
    """One answer a device: its name, the largest relative error of loss and gradient, and what is wrong, if anything.

    On a GPU this compiles the Triton kernels; on a CPU it is the torch back end.
    """
    import torch

    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else ["cpu"]
    answers = []
    for device in devices:
        try:
            error = _largest_error(device)
            problem = "" if error <= _TOLERANCE else f"off by {error:.1e} of the reference, {_TOLERANCE:.0e} is allowed"
        except Exception as failure:  # whatever a compiler or driver raises is this check's finding
            error = float("nan")
            problem = f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), 'no message')}"
        answers.append({"device": device, "error": error, "problem": problem})
    return answers


def _largest_error(device: str) -> float:
    import torch
    from dwt_kernels import distill_loss
    from dwt_kernels.reference import reference_distill_loss

    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 997, generator=draw) * 4 for _ in range(2))
    labels = torch.randint(0, 997, (64,), generator=draw)
    labels[::3] = -100
    exact_student = student.double().requires_grad_()
    exact, _, _ = reference_distill_loss(exact_student, teacher, labels, temperature=2.0, soft_weight=3.0)
    exact.backward()
    ours_student = student.to(device).requires_grad_()
    ours = distill_loss(ours_student, teacher.to(device), labels.to(device), temperature=2.0, soft_weight=3.0)
    ours.loss.backward()
    assert exact_student.grad is not None
    assert ours_student.grad is not None
    loss_error = ((ours.loss.cpu() - exact).abs() / exact.abs()).item()
    gradient_error = (ours_student.grad.cpu() - exact_student.grad).abs().max() / exact_student.grad.abs().max()
    return max(loss_error, gradient_error.item())
