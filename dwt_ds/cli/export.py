"""Make a Hugging Face folder of a run's checkpoint: safetensors, tokenizer and model card.

Works for every ZeRO stage, without a launcher. The checkpoint is verified first, since DeepSpeed's files are pickles.
The result is read back and compared with the checkpoint.
"""

from __future__ import annotations

import argparse

from dwt_ds.base.processes import home_path
from dwt_ds.base.quiet import quieten_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=home_path, help="folder of a run (its newest good checkpoint), or of one checkpoint"
    )
    parser.add_argument("--out", type=home_path, required=True, metavar="DIR", help="folder to write; must not exist")


def main(args: argparse.Namespace) -> int:
    quieten_libraries()
    from dwt_ds.export.from_checkpoint import export_checkpoint

    step = export_checkpoint(args.run, args.out)
    print(f"{args.out}: the student at step {step}, read back and compared")
    return 0
