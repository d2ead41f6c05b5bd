"""Run a grid of pre-trainings, each teacher before its students.

GRID is a file, or the name of a packaged grid. Running the command again skips
finished runs and resumes a stopped run from its checkpoint. A run that fails
does not stop the others. Afterwards `dwt-ds report OUT` draws the results.
"""

from __future__ import annotations

import argparse

from dwt_ds.base.processes import home_path
from dwt_ds.base.streams import outlive_lost_output
from dwt_ds.base.words import table
from dwt_ds.cli.options import options_of
from dwt_ds.study.grid import SCALES, grid_questions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(["grids:", *(f"  {line}" for line in table(list(grid_questions().items())))])
    parser.add_argument("grid", metavar="GRID", help="a file, or the name of one of the grids below")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings for all runs")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="smoke",
        help="smoke: minutes, only a test; small: hours on two cores; gpu: minutes on one GPU, many runs at once; "
        "paper: the paper's (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=home_path,
        metavar="DIR",
        help="default: runs/study/SCALE, or runs/study/SCALE_GRID for a grid with settings of its own",
    )
    parser.add_argument("--seeds", metavar="A,B", help="seeds of the students, instead of the grid's or the scale's")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks per run (default: the scale's)")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, all on the same GPUs: small ones leave most of a GPU idle (default: %(default)s)",
    )
    parser.add_argument(
        "--glue",
        metavar="DIR|hub",
        help="fine-tune and score every export on GLUE: a folder of GLUE's TSV files, or nyu-mll/glue from the hub",
    )
    parser.add_argument("--dry-run", action="store_true", help="list runs, steps, tokens and hours; run nothing")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="device for the estimate of hours, as in dwt-ds plan (default: cpu; a100-80 if there is a GPU and for the "
        "scales gpu and paper)",
    )


def main(args: argparse.Namespace) -> int:
    from dwt_ds.base.quiet import quieten_libraries

    quieten_libraries()
    from dwt_ds.study.run import StudyOptions, run_study

    for name, number in (("--ranks", args.ranks), ("--at-once", args.at_once)):
        if number is not None and number < 1:
            raise ValueError(f"{name} {number}: must be at least 1")
    given = options_of(StudyOptions, args)
    options = StudyOptions(**given | {"seeds": _seeds(args.seeds), "overrides": tuple(args.overrides)})
    if not args.dry_run:
        outlive_lost_output()
    return run_study(options, dry_run=args.dry_run)


def _seeds(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"--seeds={text!r}: write whole numbers separated by commas, such as 42,43") from None
