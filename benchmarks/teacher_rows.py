"""Batches with the rows of a teacher that has a vocabulary of its own: tokens a second, and how much is shared.

    python benchmarks/teacher_rows.py --data DIR --teacher TOKENIZER
    python benchmarks/teacher_rows.py --text FILE [--characters N]

With --text, pairs of tokenizers are trained on the halves of a file, the student's on one and the teacher's on the
other, and the student's half is prepared. Rates are the student's tokens per second of one core's processor time, in
micro-batches of --micro-batch rows, masks drawn. Results are added to benchmarks/results/teacher_rows.csv.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import tokenizers
import torch
from rows import RESULTS, append_row, processor_and_cores
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.batches import StepBatches
from dwt_ds.data.prepared import PreparedData
from dwt_ds.data.teacher_rows import TeacherTokens
from dwt_ds.prepare.case_and_accents import Wishes
from dwt_ds.prepare.options import PrepareOptions
from dwt_ds.prepare.pipeline import prepare
from dwt_ds.prepare.reading import LocalFile
from dwt_ds.prepare.train_tokenizer import Kind, train_tokenizer

Trained = tuple[Kind, int, bool]
# (kind, entries, cased) of the student's tokenizer and of the teacher's.
PAIRS: dict[str, tuple[Trained, Trained]] = {
    "WordPiece uncased 8k to byte-level BPE 8k": (("wordpiece", 8192, False), ("bpe", 8192, True)),
    "WordPiece cased 8k to uncased 8k": (("wordpiece", 8192, True), ("wordpiece", 8192, False)),
    "WordPiece uncased 8k to 32k": (("wordpiece", 8192, False), ("wordpiece", 32768, False)),
    "Unigram 8k to WordPiece uncased 8k": (("unigram", 8192, True), ("wordpiece", 8192, False)),
    "characters to byte-level BPE 8k": (("characters", 2000, True), ("bpe", 8192, True)),
}


def trained(text: str, how: Trained) -> PreTrainedTokenizerBase:
    kind, entries, cased = how
    return train_tokenizer([text], entries, kind, Wishes(cased))


def measured(
    data: PreparedData, teacher: PreTrainedTokenizerBase, micro_batch: int, seconds: float
) -> dict[str, float]:
    """Rates with and without a teacher, and shares; the first ten steps are not counted."""
    tokens = TeacherTokens.of(data.tokenizer(), teacher, None)
    counts = {"tokens": 0, "teacher_tokens": 0, "labels": 0, "aligned": 0}
    rates, sizes = {}, {"micro_batch_size": micro_batch, "accumulation": 1, "rank": 0, "world_size": 1}
    for name, teacher_tokens in (("tokens_per_second", tokens), ("without_a_teacher", None)):
        batches = StepBatches(data.train, data.facts, DataConfig(), seed=0, teacher_tokens=teacher_tokens, **sizes)
        for step in range(10):
            batches[step]
        seen, step, start = 0, 10, time.process_time()
        while (elapsed := time.process_time() - start) < seconds:
            [batch] = batches[step]
            seen, step = seen + batch.token_count, step + 1
            if batch.teacher is not None:
                ids, mask, *_ = batch.teacher
                counts["tokens"] += batch.token_count
                counts["teacher_tokens"] += ids.numel() if mask is None else int(mask.sum())
                counts["labels"] += len(batch.labels)
                counts["aligned"] += len(batch.teacher.aligned)
        rates[name] = round(seen / elapsed)
    return rates | {
        "labels_aligned": round(counts["aligned"] / counts["labels"], 4),
        "teacher_tokens_a_token": round(counts["teacher_tokens"] / counts["tokens"], 3),
        "entries_shared": len(tokens.shared.student_ids),
        "share_of_student": round(tokens.shared.share_of_student, 4),
        "share_of_teacher": round(tokens.shared.share_of_teacher, 4),
    }


def report(pair: str, figures: dict[str, float]) -> None:
    print(pair, figures, flush=True)
    made_with = {
        "cpu": processor_and_cores(),
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
    }
    append_row(RESULTS / "teacher_rows.csv", {"pair": pair, **figures, **made_with})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data folder")
    parser.add_argument("--teacher", help="a tokenizer: a folder or a name on the hub")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--characters", type=int, default=8_000_000, help="of --text")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    if (args.data is None) != (args.teacher is None) or (args.data is None) == (args.text is None):
        parser.error("give --data and --teacher, or --text")
    torch.set_num_threads(1)
    if args.data is not None:
        data = PreparedData.open(args.data)
        figures = measured(data, AutoTokenizer.from_pretrained(args.teacher), args.micro_batch, args.seconds)
        report(f"{args.data.name} to {Path(args.teacher).name}", figures)
        return
    with open(args.text, encoding="utf-8") as file:
        text = file.read(args.characters)
    ours, theirs = text[: len(text) // 2], text[len(text) // 2 :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(ours, encoding="utf-8")
        for number, (pair, (student, its_teacher)) in enumerate(PAIRS.items()):
            tokenizer, out = folder / f"tokenizer-{number}", folder / f"data-{number}"
            trained(ours, student).save_pretrained(tokenizer)
            prepare(PrepareOptions(sources=[LocalFile(folder / "text.txt")], out=out, tokenizer=str(tokenizer)))
            report(pair, measured(PreparedData.open(out), trained(theirs, its_teacher), args.micro_batch, args.seconds))


if __name__ == "__main__":
    main()
