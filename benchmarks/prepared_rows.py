"""The data folder of a benchmark: rows of a text, or of the documentation of the installed packages."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from dwt_ds.base.processes import own_command


def prepare_rows(options: argparse.Namespace, out: Path, vocabulary: int, seq_len: int, *further: str) -> None:
    """Runs `dwt-ds prepare`.

    Args:
        options: `text`, a file, and `tokenizer`, a vocab.txt or a name, where they are given.
        vocabulary: entries of the tokenizer that is trained if none is given.
        further: options of the command.
    """
    words = ["--text", options.text] if options.text else ["--docs"]
    words += ["--tokenizer", options.tokenizer] if options.tokenizer else ["--train-tokenizer", str(vocabulary)]
    words += ["--seq-len", str(seq_len), *further, "--out", str(out)]
    subprocess.run(own_command("prepare", *words), check=True, stdout=subprocess.DEVNULL)
