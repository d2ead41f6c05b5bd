"""A prepared folder of invented text, for measuring speed where there is no other and no network.

    python benchmarks/stand_in_data.py DIR [--rows 2048] [--seq-len 128] [--vocabulary 30522]

Words are drawn by Zipf's law; each is a token, so that a model's sizes are those with BERT's vocabulary. There is
nothing in the text to learn.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from itertools import islice, product
from pathlib import Path

import numpy as np

from dwt_ds.base.processes import own_command

SENTENCE_WORDS = 20
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def main() -> int:
    """Exit code of `dwt-ds prepare`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--rows", type=int, default=2048, help="about how many")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=30_522, help="entries")
    options = parser.parse_args()
    letters = [chr(ord("a") + number) for number in range(26)]
    syllables = [c + v for c in "bcdfghjklmnprstvwxyz" for v in "aeiou"]
    frame = [*SPECIAL, ".", *letters, *(f"##{letter}" for letter in letters)]
    count = options.vocabulary - len(frame)
    words = np.array(["".join(three) for three in islice(product(syllables, repeat=3), count)])
    draws = np.random.default_rng(0).zipf(1.2, size=(options.rows * options.seq_len // SENTENCE_WORDS, SENTENCE_WORDS))
    sentences = [" ".join(line) + " ." for line in words[(draws - 1) % count]]
    documents = ["\n".join(sentences[first : first + 10]) for first in range(0, len(sentences), 10)]
    with tempfile.TemporaryDirectory() as folder:
        text, vocabulary = Path(folder, "invented.txt"), Path(folder, "vocab.txt")
        text.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        vocabulary.write_text("\n".join([*frame, *words]) + "\n", encoding="utf-8")
        words = ["--text", text, "--tokenizer", vocabulary, "--out", options.out, "--seq-len", options.seq_len]
        return subprocess.run(own_command("prepare", *map(str, words))).returncode


if __name__ == "__main__":
    sys.exit(main())
