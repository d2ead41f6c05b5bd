"""Draw the results of runs or of a study: a self-contained HTML page; figures as PNG files and a table as Markdown.

Of runs: sizes, tokens, time, tokens/s, MFU and held-out losses beside one another, what each saved against the run that
--against names, loss curves by steps, tokens or time, and the settings that differ. Of a study: series compared with
the lone student, or with the one that --against names, seed by seed; and the paper's figures 2, 3 and 4. What is still
running can be drawn too.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from dwt_ds.base.processes import home_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", type=home_path, nargs="+", metavar="RUN|STUDY", help="folders of runs, or of one study"
    )
    parser.add_argument(
        "--against",
        metavar="NAME",
        help="the run with which the others are compared: how many tokens, FLOPs and seconds each takes until it is as "
        "good as this one is at its end; of a study a series (default: the lone student)",
    )
    parser.add_argument(
        "--out",
        type=home_path,
        metavar="DIR",
        help="default: RUN/report, STUDY/report, or a folder report beside the runs",
    )


def check_matplotlib() -> None:
    """Raise ValueError where matplotlib, which the figures need, is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("dwt-ds report needs matplotlib: pip install 'dwt-ds[study]'")


def main(args: argparse.Namespace) -> int:
    check_matplotlib()
    from dwt_ds.base.quiet import quieten_libraries

    quieten_libraries()
    from dwt_ds.study.report import write_report

    print(f"written: {write_report(args.paths, args.out, args.against)}")
    return 0
