"""Check a run, a checkpoint, an export or a data set against the manifest that was written with it.

Prints for each folder whether it is good, and for each damaged file what is wrong. Exit code 1 if anything is damaged.
"""

from __future__ import annotations

import argparse

from dwt_ds.base.processes import home_path
from dwt_ds.export.verify import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=home_path, help="folder of a run, a checkpoint, an export or a data set")


def main(args: argparse.Namespace) -> int:
    findings = verify(args.path)
    for finding in findings:
        print(f"{'DAMAGED' if finding.problems else 'good':<8} {finding.kind:<10} {finding.path}")
        for problem in finding.problems:
            print(f"{'':<8} {problem}")
    return int(any(finding.problems for finding in findings))
