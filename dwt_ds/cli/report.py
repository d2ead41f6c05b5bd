"""Draw the results of a run or a study: one self-contained HTML file, and its figures as PNG files.

Loss curves against steps, tokens and seconds; final losses with their spread over seeds; how many tokens and operations
a distilled student saves until it is as good as the lone student; the settings that differ; the paper's figures 2, 3
and 4 from your runs. A study that is still running can be drawn too.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN|STUDY", help="the folder of a run, or of a study")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/report or STUDY/report")


def main(args: argparse.Namespace) -> int:
    if find_spec("matplotlib") is None:
        raise ValueError("dwt-ds report needs matplotlib: pip install 'dwt-ds[study]'")
    from dwt_ds.base.quiet import quieten_libraries

    quieten_libraries()
    # Imported here: --help should not wait for torch.
    from dwt_ds.study.report import write_report

    print(f"{write_report(args.path, args.out or args.path / 'report')} is written")
    return 0
