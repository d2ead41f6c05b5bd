"""Model FLOPs utilization: a run's arithmetic as a share of what its devices can do (Chowdhery et al. 2022, PaLM,
appendix B, but with the matrix products counted one by one).
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

import torch

from dwt_ds.base.words import one_line
from dwt_ds.config.schema import RunConfig
from dwt_ds.data.overlap import Overlap
from dwt_ds.engine import ranks
from dwt_ds.models.build import DTYPES
from dwt_ds.models.flops import Work, meta_model, work_of_a_row
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.run.progress import print_line
from dwt_ds.run.resolve import Corpus, Resolved

PEAK_TFLOPS = {
    "A100": (312.0, 19.5),
    "H100 80GB HBM3": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "L40S": (362.0, 91.6),
}
"""By whole words of the device's name: dense bf16 or fp16, and fp32 without TF32, by NVIDIA's data sheets."""

# Parts of a GPU, by MIG or as a virtual GPU ("NVIDIA A100-40C"), and the cards called NVL.
_OTHER_RATE = re.compile(r"\b(MIG|GRID|NVL)\b|-\d+[ABCQ]\b")
_MEASURE_SECONDS = 0.1


@dataclass(frozen=True)
class Utilization:
    """Turns a rate of tokens into shares of the peak."""

    work_per_token: Work
    """Operations for one real token."""
    peak_flops_per_second: float
    """Of all ranks together."""

    @classmethod
    def of(
        cls,
        resolved: Resolved,
        student: GatheredMaskedLM,
        teacher: GatheredMaskedLM | None,
        overlap: Overlap | None = None,
    ) -> Utilization | None:
        """That of a run; measures the device's matrix rate if it is not in the table, which takes 0.1 s.

        None, after saying why, for models whose operations cannot be counted without their values. `overlap` is that of
        a teacher with a vocabulary of its own.
        """
        try:
            models = _meta(student), None if teacher is None else _meta(teacher)
            whole_row = row_work(resolved.config, resolved.corpus, *models, overlap)
        except Exception as error:  # each model's code fails in its own way
            print_line(f"MFU is not known: the operations of a step cannot be counted ({one_line(error)})")
            return None
        work = whole_row.per_token(resolved.corpus.tokens_per_row)
        return cls(work, ranks.world_size() * peak_flops_per_second(ranks.device(), resolved.ds.compute_precision))

    def without_teacher(self) -> Utilization:
        """The same once the teacher is released."""
        return replace(self, work_per_token=self.work_per_token.without_teacher())

    @property
    def share_without_teacher(self) -> float:
        """Work of a token once the teacher is released, as a share of today's; 1 from then on."""
        return self.without_teacher().work_per_token.per_row / self.work_per_token.per_row

    def shares(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu` with the teacher's forward pass counted, `mfu_student` without."""
        a_share = tokens_per_second / self.peak_flops_per_second
        return {
            "mfu": self.work_per_token.per_row * a_share,
            "mfu_student": 3 * self.work_per_token.student_forward * a_share,
        }


def row_work(
    config: RunConfig,
    corpus: Corpus,
    student: GatheredMaskedLM,
    teacher: GatheredMaskedLM | None,
    overlap: Overlap | None,
) -> Work:
    """Operations for a row of a run in the mean; its models are on the meta device."""
    corpus = corpus.with_mean_rows
    return work_of_a_row(
        student,
        teacher,
        seq_len=corpus.seq_len,
        labels=corpus.labels_per_row(config.data.mask_probability),
        further=corpus.further_per_row(config.data.mask_probability, config.distill.soft_positions),
        vocab_size=corpus.vocab_size,
        overlap=overlap,
        hidden_loss=config.distill.hidden_weight > 0,
    )


def _meta(gathered: GatheredMaskedLM) -> GatheredMaskedLM:
    return meta_model(gathered.model.config, type(gathered.model))


def peak_flops_per_second(device: torch.device, precision: str) -> float:
    """The data sheet's rate of this device in `bf16`, `fp16` or `fp32`, or the rate of a large matrix product on it."""
    # NVIDIA's containers let fp32 products be rounded to TF32, which is several times as fast.
    rounds_fp32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    if device.type == "cuda" and not rounds_fp32:
        name = torch.cuda.get_device_name(device)
        for part, (tflops_16_bit, tflops_fp32) in PEAK_TFLOPS.items():
            if re.search(rf"\b{part}\b", name) and not _OTHER_RATE.search(name):
                return 1e12 * (tflops_fp32 if precision == "fp32" else tflops_16_bit)
    return matrix_rate(device, DTYPES[precision])


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several products of square matrices."""
    width = 8192 if device.type == "cuda" else 512
    # Random, since a GPU multiplies equal numbers faster; by a generator of its own, so that training draws the same.
    draw = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(width, width, generator=draw, dtype=dtype, device=device) for _ in range(2))
    fastest, until = 0.0, time.perf_counter() + _MEASURE_SECONDS
    while not fastest or time.perf_counter() < until:
        began = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for a GPU
        fastest = max(fastest, 2 * width**3 / (time.perf_counter() - began))
    return fastest
