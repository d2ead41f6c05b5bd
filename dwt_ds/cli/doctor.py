"""Check whether this machine, or every host of a hostfile, is ready to train, and print a fix for what is not.

Compares versions over the hosts; checks GPUs and driver, ssh, names, network interfaces, clocks, disks and the shared
folder; checks the loss kernel against its fp64 reference on each device; builds DeepSpeed's operators; times a
collective over all ranks, started as dwt-ds launch starts a run, with the same environment variables. Exit code: 0 if
all checks pass, 1 if one fails, 2 if the hostfile or a variable cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dwt_ds.base.processes import home_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hostfile",
        type=home_path,
        metavar="FILE",
        help="as for dwt-ds launch (default: this machine alone)",
    )
    parser.add_argument(
        "--shared",
        type=home_path,
        default=Path(),
        metavar="DIR",
        help="folder that all hosts share, where runs will be written (default: the current one)",
    )
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="also name the tokenizers of this recipe's data folder and teacher, and check that they go together",
    )


def main(args: argparse.Namespace) -> int:
    from dwt_ds.doctor.commands import end_commands_on_signals
    from dwt_ds.doctor.examine import examine
    from dwt_ds.doctor.judge import render

    end_commands_on_signals()
    results = examine(args.hostfile, args.shared, lambda text: print(text, file=sys.stderr, flush=True))
    if args.recipe is not None:
        from dwt_ds.doctor.tokenizers import check_tokenizers

        results.append(check_tokenizers(args.recipe))
    print(render(results, colour=sys.stdout.isatty()))
    return 0 if all(result.passed for result in results) else 1
