"""How fast the paper's student trains with its 4-layer teacher, against the loop a user would write today.

    python benchmarks/training_speed.py [--text FILE] [--tokenizer VOCAB] [--steps 15] [--loop-steps 6]

Both read the same text on the same machine in one run and are counted in real (non-pad) tokens over elapsed seconds,
micro-batch 16, accumulation 1, dropout 0.1, optimizer included:

* the loop: plain transformers in bf16, one sentence a row padded to the longest of 16, full logits of both models,
  eager cross-entropy and KL divergence in fp32, torch's AdamW;
* dwt_ds: `deepspeed --module dwt_ds.pretrain paper_weak` on packed rows of 128.

Rounds of the two alternate, so that a machine whose speed drifts treats them alike. The share of the measured bf16
GEMM rate counts the floating-point operations of student and teacher that training needs, the teacher's forward pass
included and nothing that is recomputed. Results go to benchmarks/results/training_speed.csv.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rows import append_row, processor
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

from dwt_ds.data.prepared import PreparedData
from dwt_ds.launch.local import on_this_machine, visible_ranks
from dwt_ds.run.folder import RunFolder

MICRO_BATCH, SEQ_LEN, HIDDEN, STUDENT_LAYERS, TEACHER_LAYERS = 16, 128, 768, 6, 4
RESULTS = Path(__file__).parent / "results" / "training_speed.csv"


def main() -> int:
    """Prints the figures and appends them to the CSV."""
    options = _options()
    on_gpu = torch.cuda.is_available()
    ranks = options.ranks or visible_ranks(without_gpu=1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        packed, sentences = folder / "packed", folder / "sentences"
        _prepare(options, packed)
        _prepare(options, sentences, "--one-sentence-per-row")
        vocab_size = _make_teacher(packed, folder / "teacher")
        loop = EagerLoop(sentences, folder / "teacher", vocab_size)
        flops = flops_per_token(vocab_size)
        rounds = []
        for number in range(options.rounds):
            gemm = gemm_flops_per_second()
            theirs = loop.tokens_per_second(options.loop_steps)
            ours = pretrain_tokens_per_second(
                packed, folder / "teacher", folder / f"run_{number}", options.steps, ranks
            )
            rounds.append({"gemm": gemm, "loop": theirs, "ours": ours})
            print(
                f"round {number + 1}: loop {theirs:,.0f} tokens/s, dwt_ds {ours:,.0f}, GEMM {gemm / 1e9:,.0f} GFLOP/s"
            )
    ratios = [each["ours"] / each["loop"] for each in rounds]
    row = {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "cores": len(os.sched_getaffinity(0)),
        "ranks": ranks,
        "torch": torch.__version__,
        "text": Path(options.text).name if options.text else "package documentation",
        "loop_tokens_per_second": round(statistics.median(each["loop"] for each in rounds), 1),
        "dwt_ds_tokens_per_second": round(statistics.median(each["ours"] for each in rounds), 1),
        "ratio_min": round(min(ratios), 2),
        "ratio_median": round(statistics.median(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "gemm_gflops": round(statistics.median(each["gemm"] for each in rounds) / 1e9, 1),
        # Ranks on a CPU share the cores that the GEMM was measured on; on GPUs each has its own.
        "gemm_share": round(
            statistics.median(each["ours"] * flops / (each["gemm"] * (ranks if on_gpu else 1)) for each in rounds), 3
        ),
    }
    print("\n".join(f"{key:<26} {value}" for key, value in row.items()))
    append_row(RESULTS, row)
    return 0


def flops_per_token(vocab_size: int, labelled_share: float = 19 / 128) -> float:
    """Operations that training needs for one real token: student three passes, teacher one.

    In the last layer all but keys, values, queries and their attention is needed at the labelled tokens only.
    """
    attention = 4 * SEQ_LEN * HIDDEN  # scores, and their product with the values
    layer = 2 * 12 * HIDDEN**2 + attention
    last = 2 * 3 * HIDDEN**2 + attention + labelled_share * 2 * 9 * HIDDEN**2
    head = labelled_share * 2 * (HIDDEN**2 + HIDDEN * vocab_size)
    return 3 * ((STUDENT_LAYERS - 1) * layer + last + head) + (TEACHER_LAYERS - 1) * layer + last + head


def gemm_flops_per_second() -> float:
    """Rate of one feed-forward product of the student in bf16, (2048, 768) x (768, 3072), or larger on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, inner, columns = (8192, 8192, 8192) if device == "cuda" else (MICRO_BATCH * SEQ_LEN, HIDDEN, 4 * HIDDEN)
    a = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
    b = torch.randn(inner, columns, dtype=torch.bfloat16, device=device)
    for _ in range(5):
        a @ b
    seconds = []
    for _ in range(20):
        _synchronize()
        began = time.perf_counter()
        a @ b
        _synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * rows * inner * columns / statistics.median(seconds)


class EagerLoop:
    """The loop a user would write: sentences as rows, full logits, eager losses, torch's AdamW."""

    def __init__(self, sentences: Path, teacher: Path, vocab_size: int) -> None:
        data = PreparedData.open(sentences)
        self._tokenizer = data.tokenizer()
        self._table = data.train
        self._order = random.Random(0)
        self._collate = DataCollatorForLanguageModeling(self._tokenizer, mlm_probability=0.15)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        config = BertConfig(vocab_size=vocab_size, num_hidden_layers=STUDENT_LAYERS)
        self._student = BertForMaskedLM(config).to(self._device, torch.bfloat16).train()
        self._teacher = BertForMaskedLM.from_pretrained(teacher, dtype=torch.bfloat16).to(self._device).eval()
        self._optimizer = torch.optim.AdamW(self._student.parameters(), lr=5e-4)
        self._step()  # the first step also allocates the optimizer's state

    def tokens_per_second(self, steps: int) -> float:
        """Real tokens over elapsed seconds of `steps` steps."""
        _synchronize()
        began = time.perf_counter()
        tokens = sum(self._step() for _ in range(steps))
        _synchronize()
        return tokens / (time.perf_counter() - began)

    def _step(self) -> int:
        rows = [self._order.randrange(len(self._table)) for _ in range(MICRO_BATCH)]
        ids, lengths = self._table.rows(np.array(rows))
        batch = self._collate([{"input_ids": row[:n].tolist()} for row, n in zip(ids, lengths)])
        inputs = {key: batch[key].to(self._device) for key in ("input_ids", "attention_mask")}
        labels = batch["labels"].flatten().to(self._device)
        with torch.no_grad():
            teacher_logits = self._teacher(**inputs).logits.flatten(0, 1)
        logits = self._student(**inputs).logits.flatten(0, 1)
        labelled = labels != -100
        hard = F.cross_entropy(logits.float(), labels)
        soft = F.kl_div(
            F.log_softmax(logits.float(), -1)[labelled],
            F.log_softmax(teacher_logits.float(), -1)[labelled],
            log_target=True,
            reduction="batchmean",
        )
        (hard + soft).backward()
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return int(lengths.sum())


def pretrain_tokens_per_second(data: Path, teacher: Path, output: Path, steps: int, ranks: int) -> float:
    """Real tokens over elapsed seconds of `steps` steps of the recipe paper_weak, after five to warm up."""
    warm_up = 5
    settings = {
        "data.dir": data,
        "teacher.path": teacher,
        "output_dir": output,
        "train.max_steps": warm_up + steps,
        "train.log_every": warm_up,
        "train.eval_rows": MICRO_BATCH * ranks,
        "train.eval_every": 0,
        "train.checkpoint_every": 0,
    }
    launch = on_this_machine({**os.environ, "RANKS": str(ranks)})
    command = launch.command("dwt_ds.pretrain", ["paper_weak", *(f"{key}={value}" for key, value in settings.items())])
    subprocess.run(command, env=launch.environment, check=True, stdout=subprocess.DEVNULL)
    rows = RunFolder(str(output)).metrics_rows()
    first = next(row for row in rows if row["step"] == warm_up)
    last = next(row for row in reversed(rows) if "loss" in row)
    shutil.rmtree(output)
    return (last["tokens"] - first["tokens"]) / (last["elapsed_seconds"] - first["elapsed_seconds"])


def _prepare(options: argparse.Namespace, out: Path, *form: str) -> None:
    text = ["--text", options.text] if options.text else ["--docs"]
    tokenizer = ["--tokenizer", options.tokenizer] if options.tokenizer else ["--train-tokenizer", "30522"]
    command = [Path(sys.executable).with_name("dwt-ds"), "prepare", *text, *tokenizer, "--seq-len", str(SEQ_LEN)]
    subprocess.run([*command, *form, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)


def _make_teacher(data: Path, out: Path) -> int:
    """A random teacher costs what a trained one costs. Returns the vocabulary size."""
    tokenizer = PreparedData.open(data).tokenizer()
    tokenizer.save_pretrained(out)
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=TEACHER_LAYERS)
    BertForMaskedLM(config).save_pretrained(out)
    return len(tokenizer)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="text file; without one, the installed packages' documentation")
    parser.add_argument("--tokenizer", help="vocab.txt or Hugging Face name; without one, 30,522 entries trained here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15, help="steps of dwt_ds a round")
    parser.add_argument("--loop-steps", type=int, default=6, help="steps of the loop a round")
    parser.add_argument("--ranks", type=int, help="ranks of dwt_ds; by default all GPUs, or one on a CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
