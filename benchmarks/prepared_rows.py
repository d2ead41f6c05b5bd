"""The data folder of a benchmark, of a text or of the documentation of the installed packages; and runs on it."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

from dwt_ds.base.processes import own_command
from dwt_ds.launch.local import on_this_machine


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


def pretrain(recipe: str, settings: dict[str, object], ranks: int) -> None:
    """Runs a recipe to its end, with DeepSpeed's launcher."""
    launch = on_this_machine({**os.environ, "RANKS": str(ranks)})
    command = launch.command("dwt_ds.pretrain", [recipe, *(f"{key}={value}" for key, value in settings.items())])
    subprocess.run(command, env=launch.environment, check=True, stdout=subprocess.DEVNULL)
