"""linear_distill_loss, chunked and without logits: time, share of the GEMM rate and memory, forward + backward.

    python kernels/benchmarks/linear_form.py [--rounds N] [--shapes 8192x128256x2048x4096 ...] [--providers NAME ...]
                                             [--out DIR]

bf16 hidden states and heads, temperature 2, every row labelled. Against eager torch (products, then the loss on fp32
upcasts), torch.compile, and Liger's chunked distillation loss (its generalized Jensen-Shannon divergence at beta 0 is
the same KL divergence) where liger-kernel is installed. The hard part alone also against torch's
F.linear_cross_entropy, which torch 2.13 has. The share is that of 2 N V (3 H_s + H_t) operations at the rate of a
product of the student's shape, its columns rounded up to a multiple of 8: aligned, as the form makes them.
Results: results/linear_form_DEVICE.csv and .png. On a CPU the shapes are smaller; the device column says so.
memory="logit_free" needs a GPU. Where a provider fails, its error stands in the error column. The same command again
passes over the shapes that it has measured without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from dwt_kernels import linear_distill_loss
from dwt_kernels.linear_chunked import COLUMN_ALIGNMENT
from logits_form import TEMPERATURE, eager_loss
from measure import DEVICE, Provider, Timing, gemm_provider, liger_installed, time_all
from options import Losses, measure_shapes, parse_options
from torch import Tensor


class Shape(NamedTuple):
    rows: int
    vocabulary: int
    student_width: int
    teacher_width: int


# The first sweep changes the rows, the second the vocabulary, the third the vocabulary at few rows, where starting
# kernels weighs most (30,522 is in the first). The last shape is the one Liger publishes.
GPU_SWEEPS = {
    "rows": [Shape(rows, 30522, 768, 768) for rows in (512, 2048, 8192, 20000, 65536)],
    "vocabulary": [Shape(8192, vocabulary, 1024, 768) for vocabulary in (30522, 50368, 128256, 256000)],
    "vocabulary, 512 rows": [Shape(512, vocabulary, 768, 768) for vocabulary in (50368, 128256, 256000)],
    "liger": [Shape(8192, 128256, 2048, 4096)],
}
CPU_SWEEPS = {
    "rows": [Shape(rows, 30522, 768, 768) for rows in (77, 307)],
    "vocabulary": [Shape(256, vocabulary, 768, 768) for vocabulary in (8192, 30522)],
}

Heads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def eager_linear(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor
) -> Tensor:
    return eager_loss(F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight), labels)


def eager_hard(hidden: Tensor, weight: Tensor, _hidden: Tensor, _weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def torch_linear_hard(hidden: Tensor, weight: Tensor, _hidden: Tensor, _weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, labels)


def ours(memory: str, hard_only: bool = False) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        teacher = (None, None, None) if hard_only else (teacher_hidden, teacher_weight, None)
        return linear_distill_loss(hidden, weight, None, *teacher, labels, temperature=TEMPERATURE, memory=memory).loss

    return loss


def liger_linear(compiled: bool) -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(1.0, 1.0, beta=0.0, temperature=TEMPERATURE, compiled=compiled)

    def of_heads(*heads: Tensor) -> Tensor:
        result = loss(*heads)
        return result[0] if isinstance(result, tuple) else result

    return of_heads


def step_of(loss: Callable[..., Tensor], heads: Heads) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(*heads) * 0.5, heads[:2])


def losses() -> dict[str, Callable[..., Tensor]]:
    found = {
        "dwt_kernels chunked": ours("chunked"),
        "eager": eager_linear,
        "torch.compile": torch.compile(eager_linear, dynamic=False),
        "dwt_kernels chunked, hard only": ours("chunked", hard_only=True),
        "eager, hard only": eager_hard,
    }
    if DEVICE == "cuda":
        found["dwt_kernels logit_free"] = ours("logit_free")
    if liger_installed():
        found["liger chunked"] = liger_linear(compiled=True)
        if DEVICE == "cuda":
            found["liger chunked, not compiled"] = liger_linear(compiled=False)
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy, hard only"] = torch_linear_hard
    else:
        print(f"torch {torch.__version__} has no F.linear_cross_entropy: left out")
    return found


def measure(shape: Shape, losses: Losses, rounds: int) -> Iterator[tuple[str, Timing, dict[str, float]]]:
    rows, vocabulary, *widths = shape
    heads: list[Tensor] = []
    for width in widths:
        heads.append(torch.randn(rows, width, device=DEVICE).bfloat16())
        heads.append(torch.randn(vocabulary, width, device=DEVICE).div_(width**0.5).bfloat16())
    heads[0].requires_grad_()
    heads[1].requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    providers = [Provider(name, step_of(loss, (*heads, labels))) for name, loss in losses.items()]
    columns = -(-vocabulary // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT
    timings = time_all([*providers, gemm_provider(rows, shape.student_width, columns)], rounds)
    rate = 2 * rows * shape.student_width * columns / (timings.pop("gemm").p50_ms / 1e3)
    for name, timing in timings.items():
        products = 3 * shape.student_width + (0 if "hard only" in name else shape.teacher_width)
        share = 2 * rows * vocabulary * products / (timing.p50_ms / 1e3) / rate
        yield name, timing, {"gemm_tflop_per_s": round(rate / 1e12, 3), "share_of_gemm_rate": round(share, 3)}


def main() -> None:
    options = parse_options(__doc__, Shape)
    sweeps = GPU_SWEEPS if DEVICE == "cuda" else CPU_SWEEPS
    measure_shapes("linear_form", options, sweeps, losses(), measure)


if __name__ == "__main__":
    main()
