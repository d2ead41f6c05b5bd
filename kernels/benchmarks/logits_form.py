"""distill_loss on logits that are already there: time, share of the copy bandwidth and memory, forward + backward.

    python kernels/benchmarks/logits_form.py [--rounds N] [--shapes 512x30522 ...] [--providers NAME ...] [--out DIR]

bf16 logits, temperature 2, every row labelled, against the same loss in eager torch on fp32 upcasts, under
torch.compile, and from Liger's kernels (KL divergence and cross-entropy) where liger-kernel is installed. The share is
that of a kernel moving the 10 bytes an element that two passes need. Results: results/logits_form_DEVICE.csv and .png.
On a CPU the shapes are smaller; the device column says so. Where a provider fails, its error stands in the error
column. The same command again passes over the shapes that it has measured without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from dwt_kernels import distill_loss
from measure import COPY_BYTES, DEVICE, Provider, Timing, copy_provider, liger_installed, time_all
from options import Losses, measure_shapes, parse_options
from torch import Tensor

TEMPERATURE = 2.0
BYTES_PER_ELEMENT = 10


class Shape(NamedTuple):
    rows: int
    vocabulary: int


# The first sweep changes the rows, the second the vocabulary, the third the vocabulary at few rows, where starting
# kernels weighs most (30,522 is in the first).
GPU_SWEEPS = {
    "rows": [Shape(rows, 30522) for rows in (512, 2048, 8192, 20000, 65536)],
    "vocabulary": [Shape(8192, vocabulary) for vocabulary in (30522, 50368, 128256, 256000)],
    "vocabulary, 512 rows": [Shape(512, vocabulary) for vocabulary in (50368, 128256, 256000)],
}
CPU_SWEEPS = {
    "rows": [Shape(rows, 30522) for rows in (64, 256, 1024)],
    "vocabulary": [Shape(256, vocabulary) for vocabulary in (8192, 30522, 50368)],
}


def eager_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    student, teacher = student.float(), teacher.float()
    soft = F.kl_div(F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1), reduction="batchmean")
    return F.cross_entropy(student, labels) + soft


def our_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return distill_loss(student, teacher, labels, temperature=TEMPERATURE).loss


def our_loss_at_1(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return distill_loss(student, teacher, labels).loss


def liger_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    student_log = F.log_softmax(student.float() / TEMPERATURE, 1)
    soft = LigerKLDIVLoss(reduction="batchmean")(student_log, F.softmax(teacher.float() / TEMPERATURE, 1))
    # Liger's cross-entropy writes its gradient over its input.
    return LigerCrossEntropyLoss()(student.clone(), labels) + soft


def step_of(loss: Callable[..., Tensor], student: Tensor, *others: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(student, *others) * 0.5, student)


def measure(shape: Shape, losses: Losses, rounds: int) -> Iterator[tuple[str, Timing, dict[str, float]]]:
    student, teacher = (torch.randn(*shape, device=DEVICE).mul_(3).bfloat16() for _ in range(2))
    labels = torch.randint(0, shape.vocabulary, (shape.rows,), device=DEVICE)
    student.requires_grad_()
    providers = [Provider(name, step_of(loss, student, teacher, labels)) for name, loss in losses.items()]
    timings = time_all([*providers, copy_provider()], rounds)
    bandwidth = 2 * COPY_BYTES / (timings.pop("copy").p50_ms / 1e3)
    for name, timing in timings.items():
        share = BYTES_PER_ELEMENT * shape.rows * shape.vocabulary / (timing.p50_ms / 1e3) / bandwidth
        yield name, timing, {"copy_gb_per_s": round(bandwidth / 1e9, 2), "share_of_copy_bandwidth": round(share, 3)}


def main() -> None:
    options = parse_options(__doc__, Shape)
    losses = {"dwt_kernels": our_loss, "eager": eager_loss, "torch.compile": torch.compile(eager_loss, dynamic=False)}
    if DEVICE == "cuda":
        losses["dwt_kernels, temperature 1"] = our_loss_at_1
        if liger_installed():
            losses["liger"] = liger_loss
    sweeps = GPU_SWEEPS if DEVICE == "cuda" else CPU_SWEEPS
    measure_shapes("logits_form", options, sweeps, losses, measure)


if __name__ == "__main__":
    main()
