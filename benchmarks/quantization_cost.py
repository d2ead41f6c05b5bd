"""What quantization-aware training costs in loss and speed, beside plain bf16.

    python benchmarks/quantization_cost.py [--text FILE | --data FOLDER] [--tokenizer VOCAB] [--steps 300]

Losses: the same small student (ModernBERT, 4 layers x 128) learns the same text alone, from one seed, in bf16 under
ZeRO-2: plainly, with 8-bit weights and activations, and with 4-bit weights. They are those of held-out text, in fp32:
of the weights as they are, and of the exported model with integer weights and rounded activations. The plain student
is also rounded after its training, without having been trained for it.

Speed: the paper's student (BERT, 6 layers x 768), 16 rows of 128 tokens, a step of forward pass, backward pass and
torch's AdamW in bf16. Steps of the three alternate, so that a machine whose speed drifts treats all alike.

Results go to benchmarks/results/quantization_cost.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from prepared_rows import prepare_rows, pretrain
from rows import RESULTS, append_row, processor
from timing import seconds_of
from torch.nn import functional
from transformers import PreTrainedModel

from dwt_ds.base.gpus import gpu_count
from dwt_ds.config.quantization import parse_quantization
from dwt_ds.config.schema import DataConfig, StudentConfig
from dwt_ds.data.batches import validation_batches
from dwt_ds.data.prepared import PreparedData
from dwt_ds.models.build import build_student
from dwt_ds.models.dropout import use_cpu_dropout
from dwt_ds.models.load import load_masked_lm
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.models.quantization import add_fake_quantizers
from dwt_ds.models.quantized_export import load_quantized, quantize_checkpoint
from dwt_ds.run.folder import RunFolder

SEQ_LEN, VOCABULARY, ROWS, HELD_OUT_ROWS = 128, 8000, 16, 512
QUANTIZATIONS = ("none", "w8a8", "w4a8")


def main() -> int:
    """Prints the figures and appends them to the CSV."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = Path(options.data) if options.data else folder / "data"
        if not options.data:
            prepare_rows(options, data, VOCABULARY, SEQ_LEN)
        prepared = PreparedData.open(data)
        seconds = step_seconds(prepared.manifest.vocab_size, options.rounds)
        ratios = {name: [ours / plain for ours, plain in zip(seconds[name], seconds["none"])] for name in QUANTIZATIONS}
        plain = folder / "none" / "export"
        for name in QUANTIZATIONS:
            run = train(data, folder / name, name, options.steps, options.ranks)
            if name != "none":
                quantize_checkpoint(plain, name, folder / f"after_{name}")
            row = {
                "quantization": name,
                "data": Path(options.data or options.text or "documentation").name,
                "rows": len(prepared.train),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
                "cores": len(os.sched_getaffinity(0)),
                "ranks": options.ranks,
                "torch": torch.__version__,
                "steps": options.steps,
                "train_loss": final_loss(run),
                "held_out_unrounded": held_out_loss(load_masked_lm(run / "export", dtype=torch.float32), prepared),
                "held_out_exported": None,
                "held_out_rounded_after_training": None,
                "step_seconds": round(statistics.median(seconds[name]), 3),
                "times_plain_min": round(min(ratios[name]), 2),
                "times_plain_median": round(statistics.median(ratios[name]), 2),
                "times_plain_max": round(max(ratios[name]), 2),
                "export_megabytes": round(_megabytes(run / "export" / "model.safetensors"), 2),
            }
            if name != "none":
                exported = run / "export" / "quantized"
                row["held_out_exported"] = held_out_loss(load_quantized(exported), prepared)
                row["held_out_rounded_after_training"] = held_out_loss(
                    load_quantized(folder / f"after_{name}"), prepared
                )
                row["export_megabytes"] = round(_megabytes(exported / "quantized.safetensors"), 2)
            print("\n".join(f"{key:<32} {value}" for key, value in row.items()), flush=True)
            append_row(RESULTS / "quantization_cost.csv", row)
    return 0


def train(data: Path, output: Path, quantization: str, steps: int, ranks: int) -> Path:
    """Runs the recipe quickstart without a teacher, half as wide; returns the run's folder."""
    settings = {
        "data.dir": data,
        "teacher.path": "null",
        "output_dir": output,
        "student.quantization": quantization,
        "student.hidden_size": 128,
        "student.num_heads": 2,
        "train.micro_batch_size": ROWS,
        "train.max_steps": steps,
        "train.log_every": 5,
        "train.eval_every": 0,
        "train.eval_rows": ROWS,
        "train.checkpoint_every": 0,
    }
    pretrain("quickstart", settings, ranks)
    return output


def step_seconds(vocab_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step of the paper's student for each quantization, `rounds` of them in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labelled = round(0.15 * ROWS * SEQ_LEN)
    steps: dict[str, Callable[[], None]] = {}
    for name in QUANTIZATIONS:
        torch.manual_seed(0)
        student = build_student(StudentConfig(), vocab_size=vocab_size, seq_len=SEQ_LEN, pad_token_id=0)
        if device.type == "cpu":
            use_cpu_dropout(student)
        student.to(device, torch.bfloat16)
        quantization = parse_quantization(name)
        if quantization is not None:
            add_fake_quantizers(student, quantization)
        gathered, optimizer = GatheredMaskedLM(student), torch.optim.AdamW(student.parameters())
        tokens = torch.randint(5, vocab_size, (ROWS, SEQ_LEN), device=device)
        positions = torch.randperm(ROWS * SEQ_LEN, device=device)[:labelled]
        labels = tokens.flatten()[positions]

        def step(gathered=gathered, optimizer=optimizer, tokens=tokens, positions=positions, labels=labels) -> None:
            hidden = gathered(tokens, None, positions)
            logits = functional.linear(hidden, gathered.decoder_weight, gathered.decoder_bias)
            functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # the first step also allocates the optimizer's state
        steps[name] = step
    seconds: dict[str, list[float]] = {name: [] for name in QUANTIZATIONS}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step))
    return seconds


def final_loss(run: Path) -> float:
    """Mean training loss of the logged steps in the last fifth of a run."""
    losses = [row["loss"] for row in RunFolder(run).metrics_rows() if "loss" in row]
    return round(statistics.fmean(losses[-max(1, len(losses) // 5) :]), 4)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, data: PreparedData) -> float:
    """Mean cross-entropy over the labels of 512 validation rows, the same labels for every model."""
    gathered = GatheredMaskedLM(model.eval())
    weight, bias = gathered.decoder_weight, gathered.decoder_bias
    total, count = 0.0, 0
    rows = {"micro_batch_size": ROWS, "max_rows": HELD_OUT_ROWS}
    for batch in validation_batches(data.validation, data.facts, DataConfig(), **rows):
        hidden = gathered(batch.input_ids, batch.attention_mask, batch.positions)
        total += functional.cross_entropy(functional.linear(hidden, weight, bias), batch.labels, reduction="sum").item()
        count += batch.labels.numel()
    return round(total / count, 4)


def _megabytes(file: Path) -> float:
    return file.stat().st_size / 1e6


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="text file; without one, the installed packages' documentation")
    parser.add_argument("--data", help="folder that dwt-ds prepare wrote with --seq-len 128, instead of a text")
    parser.add_argument("--tokenizer", help=f"vocab.txt or Hugging Face name; without one, {VOCABULARY:,} entries")
    parser.add_argument("--steps", type=int, default=300, help="steps of the runs whose losses are compared")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each")
    parser.add_argument("--ranks", type=int, default=gpu_count() or 1, help="default: all GPUs, or 1")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
