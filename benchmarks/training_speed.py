"""How fast the paper's student trains with its 4-layer teacher, against the loop a user would write today.

    python benchmarks/training_speed.py [--data DIR | --text FILE --tokenizer VOCAB] [--steps 15] [--loop-steps 6]
    python benchmarks/training_speed.py --micro-batches 16 128 [--modes layers/auto ...] [--data DIR] [key=value ...]

The first form alternates rounds of the two on the same machine, counted in real (non-pad) tokens over elapsed seconds,
micro-batch 16, accumulation 1, dropout 0.1, optimizer included:

* the loop: plain transformers in bf16, one sentence a row padded to the longest of 16, full logits of both models,
  eager cross-entropy and KL divergence in fp32, torch's AdamW;
* dwt_ds: `deepspeed --module dwt_ds.pretrain paper_weak` on packed rows of 128.

The share of the measured bf16 GEMM rate counts the floating-point operations of student and teacher that training
needs, the teacher's forward pass included and nothing that is recomputed. Results: results/training_speed.csv.

The second form times the recipe paper_weak_h100 at several micro-batches in one process on one device: a row for each,
written as it comes, with tokens/s, MFU, what one profiled step launches, the share of a step in which the GPU works,
and the allocator's peak beside the plan's; traces/ gets the profiled steps (for chrome://tracing). `--loop-steps` adds
a row for the loop. A row that `--out` has of this device and code is not measured again, unless it ended with an error.
Results: results/training_steps.csv.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from eager_loop import MICRO_BATCH, EagerLoop
from micro_batches import RECIPE, measure_micro_batches
from prepared_rows import prepare_rows, pretrain
from rows import RESULTS, append_row, processor
from timing import seconds_of
from transformers import BertConfig, BertForMaskedLM

from dwt_ds.base.gpus import gpu_count
from dwt_ds.config.recipe import load_recipe
from dwt_ds.data.prepared import PreparedData
from dwt_ds.models.flops import meta_model, work_of_a_row
from dwt_ds.run.folder import RunFolder

SEQ_LEN, HIDDEN, STUDENT_LAYERS, TEACHER_LAYERS, VOCABULARY = 128, 768, 6, 4, 30_522


def main() -> int:
    """Prints the figures and writes them to a CSV file. Exit code 1 if a micro-batch ended with an error."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        if options.micro_batches:
            return 0 if _time_micro_batches(options, Path(scratch)) else 1
        _compare_with_the_loop(options, Path(scratch))
    return 0


def _time_micro_batches(options: argparse.Namespace, folder: Path) -> bool:
    data = options.data or folder / "packed"
    if not options.data:
        prepare_rows(options, data, VOCABULARY, SEQ_LEN)
    sizes = load_recipe(RECIPE, options.overrides).config.student
    student = BertConfig(
        num_hidden_layers=sizes.layers,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_heads,
        intermediate_size=4 * sizes.hidden_size,
    )
    student.vocab_size = _make_teacher(data, folder / "teacher", student)
    return measure_micro_batches(
        options.out / "training_steps.csv",
        data=data,
        teacher=folder / "teacher",
        student=student,
        overrides=options.overrides,
        micro_batches=options.micro_batches,
        modes=options.modes,
        steps=options.steps or 200,
        seconds=options.seconds,
        loop_steps=options.loop_steps or 0,
    )


def _compare_with_the_loop(options: argparse.Namespace, folder: Path) -> None:
    on_gpu = torch.cuda.is_available()
    ranks = options.ranks or gpu_count() or 1
    packed = sentences = options.data
    if not options.data:
        packed, sentences = folder / "packed", folder / "sentences"
        prepare_rows(options, packed, VOCABULARY, SEQ_LEN)
        prepare_rows(options, sentences, VOCABULARY, SEQ_LEN, "--one-sentence-per-row")
    student = BertConfig(num_hidden_layers=STUDENT_LAYERS)
    student.vocab_size = _make_teacher(packed, folder / "teacher", student)
    loop = EagerLoop(sentences, folder / "teacher", student)
    # round(0.15 x 128) labels a row.
    models = (meta_model(config) for config in (student, BertConfig.from_pretrained(folder / "teacher")))
    flops = work_of_a_row(*models, seq_len=SEQ_LEN, labels=19, vocab_size=student.vocab_size).per_row / SEQ_LEN
    rounds = []
    for number in range(options.rounds):
        gemm = gemm_flops_per_second()
        theirs = loop.tokens_per_second(options.loop_steps or 6)
        run = folder / f"run_{number}"
        ours = pretrain_tokens_per_second(packed, folder / "teacher", run, options.steps or 15, ranks)
        rounds.append({"gemm": gemm, "loop": theirs, "ours": ours})
        print(f"round {number + 1}: loop {theirs:,.0f} tokens/s, dwt_ds {ours:,.0f}, GEMM {gemm / 1e9:,.0f} GFLOP/s")
    ratios = [each["ours"] / each["loop"] for each in rounds]
    text = Path(options.text).name if options.text else "package documentation"
    row = {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "cores": len(os.sched_getaffinity(0)),
        "ranks": ranks,
        "torch": torch.__version__,
        "text": Path(options.data).name if options.data else text,
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
    append_row(options.out / "training_speed.csv", row)


def gemm_flops_per_second() -> float:
    """Rate of one feed-forward product of the student in bf16, (2048, 768) x (768, 3072), or larger on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, inner, columns = (8192, 8192, 8192) if device == "cuda" else (MICRO_BATCH * SEQ_LEN, HIDDEN, 4 * HIDDEN)
    a = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
    b = torch.randn(inner, columns, dtype=torch.bfloat16, device=device)
    for _ in range(5):
        a @ b
    return 2 * rows * inner * columns / statistics.median(seconds_of(lambda: a @ b) for _ in range(20))


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
    pretrain("paper_weak", settings, ranks)
    rows = RunFolder(output).metrics_rows()
    first = next(row for row in rows if row["step"] == warm_up)
    last = next(row for row in reversed(rows) if "loss" in row)
    shutil.rmtree(output)
    return (last["tokens"] - first["tokens"]) / (last["elapsed_seconds"] - first["elapsed_seconds"])


def _make_teacher(data: Path, out: Path, student: BertConfig) -> int:
    """A random teacher costs what a trained one costs: 4 layers of the student's width. Returns the vocabulary size."""
    tokenizer = PreparedData.open(data).tokenizer()
    tokenizer.save_pretrained(out)
    config = BertConfig(**{**student.to_dict(), "vocab_size": len(tokenizer), "num_hidden_layers": TEACHER_LAYERS})
    BertForMaskedLM(config).save_pretrained(out)
    return len(tokenizer)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="a prepared folder of packed rows, instead of --text")
    parser.add_argument("--text", help="text file; without one, the installed packages' documentation")
    parser.add_argument("--tokenizer", help="vocab.txt or Hugging Face name; without one, 30,522 entries trained here")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    parser.add_argument("--steps", type=int, help="steps of dwt_ds: a round's (15), or a micro-batch's (200)")
    parser.add_argument("--loop-steps", type=int, help="steps of the loop: a round's (6), or in all (0)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, help="ranks of dwt_ds; by default all GPUs, or one on a CPU")
    parser.add_argument("--micro-batches", type=int, nargs="+", metavar="ROWS", help="the second form")
    parser.add_argument("--seconds", type=float, default=4.0, help="no step of a micro-batch begins after this long")
    parser.add_argument(
        "--modes",
        type=_mode,
        nargs="+",
        default=[("auto", "auto")],
        metavar="COMPILE/GRAPHS",
        help="values of train.compile and train.cuda_graphs, such as layers/auto (default: auto/auto)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the second form's recipe")
    return parser.parse_intermixed_args()


def _mode(text: str) -> tuple[str, str]:
    compiled, _, graphs = text.partition("/")
    if not graphs:
        raise argparse.ArgumentTypeError(f"{text!r} is not COMPILE/GRAPHS, such as off/off")
    return compiled, graphs


if __name__ == "__main__":
    sys.exit(main())
