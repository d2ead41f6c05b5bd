"""distill_loss on logits that are already there: time, share of the copy bandwidth and memory, forward + backward.

    python kernels/benchmarks/logits_form.py [--rounds N] [--shapes 512x30522 ...] [--providers NAME ...] [--out DIR]

bf16 logits, temperature 2, every row labelled, against the same loss in eager torch on fp32 upcasts, under
torch.compile, and from Liger's kernels (KL divergence and cross-entropy) where liger-kernel is installed. The share is
that of a kernel moving the 10 bytes an element that two passes need. Results: results/logits_form_DEVICE.csv and .png.
On a CPU the shapes are smaller; the device column says so. Where a provider fails, its error stands in the error
column. The same command again passes over the shapes that it has measured without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from dwt_kernels import distill_loss
from measure import (
    COPY_BYTES,
    DEVICE,
    Provider,
    Results,
    copy_provider,
    device_name,
    draw,
    liger_installed,
    time_all,
    versions,
)
from options import chosen, parse_options
from torch import Tensor

TEMPERATURE = 2.0
BYTES_PER_ELEMENT = 10
MOST_EAGER_ROWS = 20_000
# (rows, vocabulary); the first sweep changes the rows, the second the vocabulary, the third the vocabulary at few rows,
# where starting kernels weighs most (30,522 is in the first). Eager torch needs 80 GB at 65,536 rows, and is left out.
GPU_SWEEPS = {
    "rows": [(rows, 30522) for rows in (512, 2048, 8192, 20000, 65536)],
    "vocabulary": [(8192, vocabulary) for vocabulary in (30522, 50368, 128256, 256000)],
    "vocabulary, 512 rows": [(512, vocabulary) for vocabulary in (50368, 128256, 256000)],
}
CPU_SWEEPS = {
    "rows": [(rows, 30522) for rows in (64, 256, 1024)],
    "vocabulary": [(256, vocabulary) for vocabulary in (8192, 30522, 50368)],
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


def main() -> None:
    options = parse_options(__doc__, "ROWSxVOCABULARY")
    losses = {"dwt_kernels": our_loss, "eager": eager_loss, "torch.compile": torch.compile(eager_loss, dynamic=False)}
    if DEVICE == "cuda":
        losses["dwt_kernels, temperature 1"] = our_loss_at_1
        if liger_installed():
            losses["liger"] = liger_loss
    losses = chosen(losses, options.providers)
    sweeps = {"given": options.shapes} if options.shapes else GPU_SWEEPS if DEVICE == "cuda" else CPU_SWEEPS
    results = Results("logits_form", options.out, options.rounds)
    for sweep, shapes in sweeps.items():
        for rows, vocabulary in shapes:
            shape = {"sweep": sweep, "rows": rows, "vocabulary": vocabulary}
            ways = {name: loss for name, loss in losses.items() if name != "eager" or rows <= MOST_EAGER_ROWS}
            if results.has(ways, shape):
                continue
            logits = [torch.randn(rows, vocabulary, device=DEVICE).mul_(3).bfloat16() for _ in range(2)]
            labels = torch.randint(0, vocabulary, (rows,), device=DEVICE)
            student, teacher = logits[0].requires_grad_(), logits[1]
            providers = [Provider(name, step_of(loss, student, teacher, labels)) for name, loss in ways.items()]
            timings = time_all([*providers, copy_provider()], options.rounds)
            bandwidth = 2 * COPY_BYTES / (timings.pop("copy").p50_ms / 1e3)
            needed = BYTES_PER_ELEMENT * rows * vocabulary
            lines = []
            for name, timing in timings.items():
                line = {
                    "kernel": "logits form",
                    "provider": name,
                    "device": device_name(),
                    "versions": versions(),
                    **shape,
                    "dtype": "bfloat16",
                    **timing.rounded(),
                    "copy_gb_per_s": round(bandwidth / 1e9, 2),
                    "share_of_copy_bandwidth": round(needed / (timing.p50_ms / 1e3) / bandwidth, 3),
                    "rounds": options.rounds,
                }
                lines.append(line)
            results.add(lines, shape)
    print(results.path)
    if not options.shapes:
        print(draw(results.path, results.lines, {"rows": "rows (V = 30,522)", "vocabulary": "vocabulary"}))


if __name__ == "__main__":
    main()
