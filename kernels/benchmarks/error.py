"""How far losses and gradients are from the fp64 reference, ours and eager torch's on fp32 upcasts.

    python kernels/benchmarks/error.py [--rows N] [--out DIR]

Norms of the errors over the rows, standard normal logits times 3. Results: results/error_DEVICE.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dwt_kernels import distill_loss
from dwt_kernels.reference import reference_rows
from measure import DEVICE, device_name, versions, write_csv
from torch import Tensor

VOCABULARIES = (41, 401, 1271, 30522)
MOST_LOGITS = 3_000_000
TEMPERATURES = (0.5, 1.0, 1.7, 2.0, 2.5, 8.0)


def ours(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """hard (N,) and soft (N,)."""
    result = distill_loss(student, teacher, labels, temperature=temperature, reduction="none")
    return result.hard, result.soft


def eager(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student, teacher = student.float(), teacher.float()
    probability = F.softmax(teacher / temperature, 1)
    soft = F.kl_div(F.log_softmax(student / temperature, 1), probability, reduction="none").sum(1)
    return F.cross_entropy(student, labels, reduction="none"), soft


def gradient(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    leaf = student.detach().requires_grad_()
    loss = distill_loss(leaf, teacher, labels, temperature=temperature).loss
    return torch.autograd.grad(loss, leaf)[0]


def other_gradient(function: Any, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    leaf = student.detach().requires_grad_()
    hard, soft = function(leaf, teacher, labels, temperature)
    return torch.autograd.grad(hard.mean() + soft.mean(), leaf)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: results beside this)")
    options = parser.parse_args()
    lines = []
    for vocabulary in VOCABULARIES:
        rows = min(options.rows, MOST_LOGITS // vocabulary)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            generator = torch.Generator().manual_seed(vocabulary)
            logits = [torch.randn(rows, vocabulary, generator=generator).mul_(3) for _ in range(2)]
            student, teacher = (each.to(DEVICE, dtype) for each in logits)
            labels = torch.randint(0, vocabulary, (rows,), generator=generator).to(DEVICE)
            for temperature in TEMPERATURES:
                inputs = (student, teacher, labels, temperature)
                exact_inputs = (student.double(), teacher, labels, temperature)
                exact = (*reference_rows(*exact_inputs), other_gradient(reference_rows, *exact_inputs))
                found = (*ours(*inputs), gradient(*inputs))
                others = (*eager(*inputs), other_gradient(eager, *inputs))
                for name, own, other, truth in zip(("hard", "soft", "gradient"), found, others, exact):
                    own_error, other_error = ((each.double() - truth).norm().item() for each in (own, other))
                    lines.append(
                        {
                            "quantity": name,
                            "device": device_name(),
                            "versions": versions(),
                            "rows": rows,
                            "vocabulary": vocabulary,
                            "dtype": str(dtype).removeprefix("torch."),
                            "temperature": temperature,
                            "error": f"{own_error:.3e}",
                            "eager_error": f"{other_error:.3e}",
                            "ratio": round(own_error / other_error, 3),
                        }
                    )
    worst = max(lines, key=lambda line: line["ratio"])
    print(f"largest ratio {worst['ratio']}: {worst}")
    print(write_csv("error", lines, options.out))


if __name__ == "__main__":
    main()
