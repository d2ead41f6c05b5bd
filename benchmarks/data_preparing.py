"""How fast text becomes rows, on one core, and where the time goes; how much memory a larger corpus takes.

    python benchmarks/data_preparing.py [--text FILE...] [--tokenizer VOCAB_OR_NAME] [--memory]

Without --text the documentation of the installed packages is used, without --tokenizer one of 8,192 entries is trained
on it. Rates are per second of one core's processor time, so that other work on the machine matters little; "wall" is
elapsed time. --memory instead prepares a synthetic corpus and one 50 times larger, and compares the peak memory of all
processes. Results are added to benchmarks/results/data_preparing.csv.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from rows import RESULTS, append_row, processor_and_cores

from dwt_ds.data.prepared import TOKENIZER_FOLDER, PreparedData
from dwt_ds.prepare.documentation import InstalledDocumentation
from dwt_ds.prepare.duplicates import DuplicateFinder
from dwt_ds.prepare.options import PrepareOptions
from dwt_ds.prepare.pipeline import prepare, row_settings
from dwt_ds.prepare.reading import LocalFile
from dwt_ds.prepare.rows import Chunk, rows_of_chunk, store_part
from dwt_ds.prepare.sentences import sentence_spans
from dwt_ds.prepare.sources import SourceCounts

FIELDS = ["measure", "what", "value", "unit", "corpus"]
Value = TypeVar("Value")


def timed(work: Callable[[], Value]) -> tuple[float, Value]:
    """(processor seconds, result) of `work`."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure_stages(files: list[Path], tokenizer: str | None, folder: Path) -> list[dict[str, Any]]:
    options = PrepareOptions(
        sources=[LocalFile(path) for path in files],
        out=folder / "whole",
        tokenizer=tokenizer,
        train_tokenizer=None if tokenizer else 8192,
        workers=1,
    )
    if tokenizer is None:  # its training is not part of the rate
        prepare(options)
        tokenizer = str(folder / "whole" / TOKENIZER_FOLDER)
        options = PrepareOptions(sources=options.sources, out=folder / "again", tokenizer=tokenizer)
    wall = time.perf_counter()
    whole_seconds, manifest = timed(lambda: prepare(options))
    wall = time.perf_counter() - wall

    read_seconds, documents = timed(lambda: [d for s in options.sources for d in s.documents(SourceCounts())])
    lines = [document.split("\n") for document in documents]

    def find_duplicates() -> None:
        finder = DuplicateFinder(folder / "hashes")
        for of_document in lines:
            finder.add(of_document)
        finder.finish()

    duplicate_seconds, _ = timed(find_duplicates)
    split_seconds, _ = timed(lambda: [sentence_spans(line) for of_document in lines for line in of_document])
    settings = row_settings(options, PreparedData.open(options.out).facts, options.out / TOKENIZER_FOLDER)
    chunks: list[Chunk] = []
    for document in documents:
        if not chunks or sum(map(len, chunks[-1].documents)) > 4_000_000:
            chunks.append(Chunk(len(chunks), [], [], []))
        chunks[-1].documents.append(document)
        chunks[-1].held_out.append(False)
        chunks[-1].source_of_document.append(0)
    rows_seconds, _ = timed(lambda: [rows_of_chunk(chunk, settings) for chunk in chunks])
    parts = folder / "parts"
    parts.mkdir()
    stored_seconds, _ = timed(lambda: [store_part(chunk, settings, parts) for chunk in chunks])

    stages = {
        "reading, twice": 2 * read_seconds,
        "finding duplicate lines": duplicate_seconds,
        "splitting into sentences": split_seconds,
        "filters, tokenizing, packing": rows_seconds - split_seconds,
        "storing parts": max(0.0, stored_seconds - rows_seconds),
    }
    stages["joining parts, hashes, start"] = max(0.0, whole_seconds - sum(stages.values()))
    characters = sum(map(len, documents))
    rows = [("rate", "whole, a core", manifest.tokens / whole_seconds, "tokens/s")]
    rows += [("rate", "whole, a core", characters / whole_seconds / 1e6, "M characters/s")]
    rows += [("rate", "whole, wall", manifest.tokens / wall, "tokens/s")]
    rows += [("rate", "tokens a sentence kept", manifest.tokens / manifest.sentences_kept, "tokens")]
    rows += [("rate", "padding, packed", 100 * manifest.padding_share, "%")]
    rows += [("share", name, 100 * seconds / whole_seconds, "%") for name, seconds in stages.items()]
    corpus = f"{'+'.join(path.name for path in files)}, {manifest.tokens:,} tokens"
    return [dict(zip(FIELDS, [*row, corpus], strict=True)) for row in rows]


PREPARE_AND_PRINT_PEAK = """
import resource, sys
from pathlib import Path
from dwt_ds.prepare.options import PrepareOptions
from dwt_ds.prepare.pipeline import prepare
from dwt_ds.prepare.reading import LocalFile

if __name__ == "__main__":
    text, out, vocab = sys.argv[1:]
    prepare(PrepareOptions([LocalFile(Path(text))], Path(out), tokenizer=vocab, every=4, workers=2))
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(resource.getrusage(who).ru_maxrss / 1024)
"""


def write_synthetic(path: Path, characters: int, words: list[str]) -> None:
    """Distinct lines of sentences of words, drawn by a fixed seed; a document is some 40 lines."""
    draw = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < characters:
            for _ in range(40):
                line = " ".join(draw.choices(words, k=80))
                cuts = range(20, len(line), 110)
                sentences = [line[a:b].strip().capitalize() for a, b in zip(cuts, [*cuts[1:], len(line)], strict=True)]
                file.write(". ".join(sentence for sentence in sentences if sentence) + ".\n")
            file.write("\n")


def measure_memory(folder: Path) -> list[dict[str, Any]]:
    words = ["".join(random.Random(n).choices("aeioubcdfglmnprst", k=2 + n % 8)) for n in range(8000)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."]
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(dict.fromkeys([*special, *words])) + "\n")
    script = folder / "prepare_and_print_peak.py"
    script.write_text(PREPARE_AND_PRINT_PEAK)
    results = []
    for times in (1, 50):
        text = folder / f"synthetic{times}.txt"
        write_synthetic(text, 10_000_000 * times, words)
        command = [sys.executable, str(script), str(text), str(folder / f"out{times}"), str(vocab)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        corpus = f"synthetic, {times * 10} MB"
        for what, value in zip(("main process", "largest worker"), output, strict=True):
            results.append(dict(zip(FIELDS, ["peak memory", what, float(value), "MB", corpus], strict=True)))
        text.unlink()
    return results


def report(rows: list[dict[str, Any]]) -> None:
    names = ("numpy", "tokenizers", "syntok", "pyarrow", "datasets")
    versions = " ".join(f"{name}={metadata.version(name)}" for name in names)
    machine = {"cpu": processor_and_cores(), "python": platform.python_version(), "versions": versions}
    for row in rows:
        print(f"{row['what']:<32} {row['value']:>14,.2f} {row['unit']:<15} {row['corpus']}")
        append_row(RESULTS / "data_preparing.csv", {**row, "value": round(row["value"], 3), **machine})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, default=[])
    parser.add_argument("--tokenizer")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.memory:
            report(measure_memory(folder))
            return
        files = args.text
        if not files:
            files = [InstalledDocumentation(workers=os.cpu_count() or 1).stored(folder / "documentation.txt").path]
        report(measure_stages(files, args.tokenizer, folder))
        print(
            f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB (whole corpus in memory)"
        )


if __name__ == "__main__":
    main()
