"""Check whether this machine, or every host of a hostfile, is ready to train, and say what to do where it is not.

Compares versions over the hosts; looks at GPUs and driver, ssh, names, network interfaces, clocks, disks and the shared
folder; checks the loss kernel against its fp64 reference on each device; builds DeepSpeed's operators; times a
collective over all ranks. DEEPSPEED_ARGS, LAUNCHER, LAUNCHER_ARGS, MASTER_ADDR and MASTER_PORT count as for
launchers/run_multinode.sh. Exits with 0 if everything is in order, with 1 if a check failed, with 2 if the hostfile or
one of these cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="hosts as launchers/run_multinode.sh gets them; default: only this",
    )
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder that all hosts share, where runs will be written (default: the current one)",
    )


def main(args: argparse.Namespace) -> int:
    from dwt_ds.doctor.commands import end_commands_on_signals
    from dwt_ds.doctor.examine import examine
    from dwt_ds.doctor.findings import render

    end_commands_on_signals()
    findings = examine(args.hostfile, args.shared, lambda text: print(text, file=sys.stderr, flush=True))
    print(render(findings, colour=sys.stdout.isatty()))
    return 0 if all(finding.good for finding in findings) else 1
