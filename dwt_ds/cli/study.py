"""Run a grid of pre-trainings, teachers first: what the paper asks about a weak teacher, and what you ask.

GRID is a file, or the name of a packaged grid. Finished runs are not run again, and a run that stopped goes on from
its checkpoint; one that fails does not stop the others. Then `dwt-ds report OUT` draws the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dwt_ds.study.grid import SCALES, grid_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", metavar="GRID", help=f"a file, or one of {', '.join(grid_names())}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs, as for a run")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="smoke",
        help="smoke: minutes, and shows nothing; small: hours on two cores; paper: the paper's (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/study/SCALE")
    parser.add_argument("--seeds", metavar="A,B", help="in place of the grid's, or the scale's")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes a run; default: one a GPU, or the scale's")
    parser.add_argument(
        "--glue",
        metavar="DIR|hub",
        help="fine-tune every export on GLUE and score it: a folder of GLUE's TSVs, or nyu-mll/glue on the hub",
    )
    parser.add_argument("--dry-run", action="store_true", help="list runs, steps, tokens and hours, and run nothing")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="whose rate the hours are estimated by, as in dwt-ds plan (default: cpu; a100-80 where there is a GPU and "
        "for the paper's scale)",
    )


def main(args: argparse.Namespace) -> int:
    from dwt_ds.base.quiet import quieten_libraries

    quieten_libraries()
    # Imported here: --help should not wait for torch.
    from dwt_ds.study.run import StudyOptions, run_study

    if args.ranks is not None and args.ranks < 1:
        raise ValueError(f"--ranks {args.ranks}: must be at least 1")
    options = StudyOptions(
        grid=args.grid,
        scale=args.scale,
        out=args.out,
        seeds=_seeds(args.seeds),
        ranks=args.ranks,
        gpu=args.gpu,
        glue=args.glue,
        overrides=tuple(args.overrides),
    )
    return run_study(options, dry_run=args.dry_run)


def _seeds(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"--seeds={text!r}: write whole numbers with commas, such as 42,43") from None
