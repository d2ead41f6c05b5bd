"""Memory does not grow with the corpus."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

PREPARE_AND_PRINT_PEAK = """
import resource, sys
from pathlib import Path
from dwt_ds.prepare import corpus, duplicates
from dwt_ds.prepare.options import PrepareOptions
from dwt_ds.prepare.pipeline import prepare
from dwt_ds.prepare.reading import LocalFile

if __name__ == "__main__":
    corpus.CHUNK_CHARS = 200_000
    duplicates._LINES_IN_MEMORY = 4096
    text, out, vocab, workers = sys.argv[1:]
    prepare(PrepareOptions([LocalFile(Path(text))], Path(out), tokenizer=vocab, every=4, workers=int(workers)))
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(resource.getrusage(who).ru_maxrss / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_peak_memory_of_a_corpus_fifty_times_larger(tmp_path: Path, vocab_file: Path, workers: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdfglmnprst", k=draw.randint(2, 9))) for _ in range(2000)]
    script = tmp_path / "prepare_and_print_peak.py"
    script.write_text(PREPARE_AND_PRINT_PEAK)
    peaks = []
    for megabytes in (1, 50):
        text = tmp_path / f"{megabytes}.txt"
        with open(text, "w") as file:
            while file.tell() < megabytes * 1_000_000:
                lines = [" ".join(draw.choices(words, k=15)).capitalize() for _ in range(40)]
                file.write(".\n".join(lines) + ".\n\n")
        words_of_command = [script, text, tmp_path / f"out{megabytes}", vocab_file, workers]
        command = [sys.executable, *map(str, words_of_command)]
        peaks.append([float(peak) for peak in subprocess.run(command, check=True, capture_output=True).stdout.split()])
    for small, large in zip(*peaks, strict=True):
        assert large < small + 20, f"{small:.0f} MB for 1 MB of text, {large:.0f} MB for 50 MB"
