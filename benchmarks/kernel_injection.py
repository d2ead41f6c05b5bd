"""For which model families DeepSpeed injects its inference kernels into the teacher, and how far that moves it.

    python benchmarks/kernel_injection.py [--families bert ...] [--out DIR] [--build]

Needs a CUDA device. For each family and dtype: whether the probe kept the injected engine, the largest change of the
logits as a share of the largest one, and the time of a forward pass against the plain engine. A row is written as it
comes. Results: results/kernel_injection.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from deepspeed.ops.op_builder import InferenceBuilder
from rows import RESULTS, write_rows
from timing import seconds_of
from transformers import AutoConfig, AutoModelForMaskedLM

from dwt_ds.data.batches import Batch
from dwt_ds.engine.operator_builds import prepare_operator_builds
from dwt_ds.engine.ranks import device, start_ranks, stop_ranks
from dwt_ds.engine.teacher import TeacherEngine

FAMILIES = ("bert", "roberta", "distilbert", "modernbert", "electra", "albert")
ROWS, SEQ_LEN = 64, 128


def main() -> int:
    """Prints a row for each family and dtype, and writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="FAMILY")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    parser.add_argument("--build", action="store_true", help="only compile the kernels, which takes nvcc minutes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: kernel injection needs a CUDA device", file=sys.stderr)
        return 2
    if options.build:
        prepare_operator_builds()
        InferenceBuilder().load()
        return 0
    start_ranks()
    rows = []
    for family in options.families:
        for dtype in ("bf16", "fp16"):
            rows.append(_measure(family, dtype))
            write_rows(options.out / "kernel_injection.csv", rows)
    stop_ranks()
    return 0


def _measure(family: str, dtype: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, num_hidden_layers=4)
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
        engines = {}
        for inject in (False, "auto"):
            engines[inject] = TeacherEngine(folder, dtype=dtype, kernel_inject=inject, device=device(), seq_len=SEQ_LEN)
            engines[inject].start()
    tokens = torch.randint(5, 1000, (ROWS, SEQ_LEN), device=device())
    positions = torch.arange(0, tokens.numel(), 7, device=device())
    batch = Batch(tokens, None, positions, positions, tokens.numel(), torch.arange(ROWS))
    views = (engines[each](batch) for each in (False, "auto"))
    plain, injected = (view.hidden.float() @ view.weight.float().T + view.bias.float() for view in views)
    row = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "family": family,
        "dtype": dtype,
        "injected": engines["auto"].injected,
        "said": engines["auto"].injection,
        "moved_share_of_largest": f"{((plain - injected).abs().max() / plain.abs().max()).item():.2e}",
        "plain_ms": f"{_milliseconds(engines[False], batch):.3f}",
        "auto_ms": f"{_milliseconds(engines['auto'], batch):.3f}",
    }
    for engine in engines.values():
        engine.release()  # DeepSpeed numbers the layers of a process, and has one workspace for them
    print(row, flush=True)
    return row


def _milliseconds(teacher: TeacherEngine, batch: Batch) -> float:
    return 1e3 * statistics.median(seconds_of(lambda: teacher(batch)) for _ in range(20))


if __name__ == "__main__":
    sys.exit(main())
