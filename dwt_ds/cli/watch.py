"""Show how a run in progress is doing: its last line, curves, who runs it, and what is wrong.

It reports a rank that keeps the others waiting, a long time without a new line, skipped steps, a loss that is not
finite, a nearly full disk, and a run that ended before its last step. It only reads the run's folder, so it works on
any machine that sees the folder. It follows the run to its end; with --once, or if the output is not a terminal, it
prints once, and the exit code is 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time

from dwt_ds.base.processes import home_path

# Columns beyond which a curve is not easier to read.
_WIDEST = 120
# The cursor home, and everything below it erased.
_CLEAR = "\x1b[H\x1b[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=home_path, metavar="RUN", help="the folder of a run, its output_dir")
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument(
        "--every", type=float, default=5.0, metavar="SECONDS", help="seconds between two updates (default: %(default)g)"
    )


def main(args: argparse.Namespace) -> int:
    from dwt_ds.study.watch import lines_of, observe

    if not args.every > 0:
        raise ValueError(f"--every {args.every}: must be above 0")
    in_terminal = sys.stdout.isatty()
    once = args.once or not in_terminal
    while True:
        seen = observe(args.run)
        terminal = shutil.get_terminal_size()
        height = terminal.lines if in_terminal else None
        text = "\n".join(lines_of(seen, width=min(_WIDEST, terminal.columns), height=height))
        print(text if once else f"{_CLEAR}{text}", flush=True)
        if once:
            return 1 if seen.problems else 0
        if seen.complete:
            return 0
        try:
            time.sleep(args.every)
        except KeyboardInterrupt:
            return 0
