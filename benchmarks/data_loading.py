"""How many tokens a second the loader delivers, masks drawn: in the training process, and from worker processes.

    python benchmarks/data_loading.py [--data DIR] [--micro-batch 16] [--seconds 10] [--workers 0 1 2 4]

Without --data, rows of 128 random tokens are made. Results are added to benchmarks/results/data_loading.csv.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rows import RESULTS, append_row, processor_and_cores

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.batches import StepBatches, step_loader
from dwt_ds.data.prepared import PreparedData, RowTable
from dwt_ds.data.tokenizer import TokenizerFacts
from dwt_ds.prepare.packing import Rows
from dwt_ds.prepare.shards import ShardWriter

ROWS, WIDTH, VOCABULARY = 200_000, 128, 30_522
ENDLESS = range(2**62)
MASKINGS = {
    "fixed": DataConfig(),
    "bernoulli": DataConfig(label_draw="bernoulli"),
    "whole words": DataConfig(whole_word=True),
}


def made_up(folder: Path) -> tuple[RowTable, TokenizerFacts]:
    """Full rows of random ordinary tokens; every fifth entry of the vocabulary continues a word."""
    ids = np.random.default_rng(0).integers(1000, VOCABULARY, (ROWS, WIDTH), dtype=np.uint16)
    ids[:, 0], ids[:, -1] = 101, 102
    is_special = np.isin(np.arange(VOCABULARY), [0, 100, 101, 102, 103])
    continues = (np.arange(VOCABULARY) % 5 == 0) & ~is_special
    table = Rows(ids.reshape(-1), ~continues[ids.reshape(-1)], np.full(ROWS, WIDTH, np.int32))
    shards = ShardWriter(folder / "train", VOCABULARY).write([table], ROWS)
    facts = TokenizerFacts(VOCABULARY, 0, 101, 102, 103, is_special, continues, np.flatnonzero(~is_special))
    return RowTable(folder / "train", shards, 0, WIDTH), facts


def tokens_per_second(batches: StepBatches, workers: int, seconds: float) -> tuple[float, float]:
    """Real tokens per elapsed second, and per second of this process's processor time.

    With workers the latter is what receiving batches costs the training process. The first hundred batches, during
    which workers start, are not counted.
    """
    iterator = iter(step_loader(batches, ENDLESS, workers, pin_memory=False))
    for _ in range(100):
        next(iterator)
    tokens = 0
    start, start_here = time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < seconds:
        tokens += sum(batch.token_count for batch in next(iterator))
    return tokens / elapsed, tokens / (time.process_time() - start_here)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        data = PreparedData.open(args.data) if args.data else None
        table, facts = (data.train, data.facts) if data else made_up(Path(name))
        for label, config in MASKINGS.items():
            for workers in args.workers:
                sizes = {"micro_batch_size": args.micro_batch, "accumulation": 1, "rank": 0, "world_size": 1}
                batches = StepBatches(table, facts, config, seed=0, **sizes)
                rate, here = tokens_per_second(batches, workers, args.seconds)
                print(f"{label:<12} {workers} workers: {rate / 1e6:.2f} M tokens/s, {here / 1e6:.2f} M/s of own time")
                row = {
                    "masking": label,
                    "rows": data.manifest.form if data else "made up",
                    "micro_batch": args.micro_batch,
                    "workers": workers,
                    "tokens_per_second": round(rate),
                    "tokens_per_processor_second_here": round(here),
                    "cpu": processor_and_cores(),
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                }
                append_row(RESULTS / "data_loading.csv", row)


if __name__ == "__main__":
    main()
