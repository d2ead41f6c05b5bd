"""Show what a run will need, before it starts.

Shows the settings that are not the defaults, steps and epochs, the memory of a rank part by part at each ZeRO stage,
the largest micro-batch that fits, hours, traffic, disk, and the command that starts the run; with --config also all
settings as resolved. Needs no data, teacher or GPU, and starts nothing; where data or teacher are missing, the plan
says what it assumes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dwt_ds.plan.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="path of a recipe, or the name of a packaged one")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="as for a run")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="as for a run: a path or a packaged name")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="G",
        help="ranks per machine (default: by train.expected_world_size, if that is set; else 8, or 2 on a CPU)",
    )
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help="a100-40, a100-80, h100, h200, l40s or cpu (default: %(default)s)"
    )
    parser.add_argument(
        "--mfu", type=float, metavar="X", help="share of the peak rate that training reaches (default: by --gpu)"
    )
    parser.add_argument(
        "--launch-us",
        type=float,
        metavar="X",
        help="host time to start one operation, in microseconds (default: measured)",
    )
    parser.add_argument("--network-gbps", type=float, metavar="X", help="network rate of a machine (default: by --gpu)")
    parser.add_argument("--data", metavar="DIR", help="a prepared data folder (default: the recipe's)")
    parser.add_argument(
        "--release-at",
        type=float,
        metavar="SHARE",
        help="share of the steps after which the teacher is released (default, and the maximum: where the soft "
        "weight's schedule releases it; an adaptive weight's release is not known before the run, so by default its "
        "teacher is counted to the end)",
    )
    parser.add_argument("--config", action="store_true", help="also print the whole resolved recipe and JSON")


def main(args: argparse.Namespace) -> int:
    from dwt_ds.base.quiet import quieten_libraries

    quieten_libraries()
    from dwt_ds.config.overrides import override_of
    from dwt_ds.data.manifest import read_data_manifest
    from dwt_ds.plan.hardware import find_device
    from dwt_ds.plan.plan import Plan
    from dwt_ds.plan.report import report, whole_settings
    from dwt_ds.plan.settings import resolve_plan
    from dwt_ds.plan.shapes import build_shapes

    for name in ("nodes", "gpus_per_node", "network_gbps", "launch_us"):
        _check_above_0(name, getattr(args, name))
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu {args.mfu}: must be above 0 and at most 1")
    if args.release_at is not None and not 0 <= args.release_at <= 1:
        raise ValueError(f"--release-at {args.release_at:g}: must be at least 0 and at most 1")
    per_node = args.gpus_per_node or _ranks_per_node(args)
    device = find_device(args.gpu, per_node, network_gbps=args.network_gbps, mfu=args.mfu, launch_us=args.launch_us)
    if args.data:
        read_data_manifest(Path(args.data).expanduser())  # a folder that is asked for must exist
    overrides = [*args.overrides, override_of("data.dir", args.data)] if args.data else args.overrides
    settings = resolve_plan(args.recipe, overrides, args.deepspeed_config, args.nodes * per_node)
    plan = Plan(settings, build_shapes(settings), device, args.nodes, args.release_at)
    if args.release_at is not None:
        _check_release(args.release_at, plan)
    print(report(plan, overrides, args.deepspeed_config, args.recipe))
    if args.config:
        print(f"\n{whole_settings(settings)}")
    return 0


def _check_release(share: float, plan: Plan) -> None:
    teacher, steps = plan.settings.config.teacher, plan.settings.total_steps
    if teacher.path is None:
        raise ValueError(f"--release-at {share:g}: there is no teacher to release; set teacher.path")
    if teacher.release == "never":
        raise ValueError(f"--release-at {share:g}: teacher.release=never keeps the teacher to the end; leave one out")
    if round(share * steps) > plan.scheduled_steps:
        raise ValueError(
            f"--release-at {share:g}: the soft weight's schedule releases the teacher after step "
            f"{plan.scheduled_steps:,} of {steps:,}; give less, or change distill.soft_weight"
        )


def _ranks_per_node(args: argparse.Namespace) -> int:
    from dwt_ds.config.recipe import load_recipe

    expected = load_recipe(args.recipe, args.overrides).config.train.expected_world_size or 0
    if expected % args.nodes == 0 and 0 < expected // args.nodes <= 8:
        return expected // args.nodes
    return 2 if args.gpu == "cpu" else 8


def _check_above_0(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0, and finite")
