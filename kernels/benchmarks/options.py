"""The command line that the benchmarks share: which shapes, which ways to compute, where the results go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import DEVICE

# torch.compile gives up on a function after 8 shapes, and would run it uncompiled without a word.
MOST_COMPILED_SHAPES = 64


def parse_options(doc: str | None, sizes: str) -> argparse.Namespace:
    """`rounds`, `shapes` (None, or tuples of what `sizes` names, such as ROWSxVOCABULARY), `providers` (None: all) and
    `out` (None: the folder results)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20 if DEVICE == "cuda" else 5)
    parser.add_argument("--shapes", nargs="+", metavar=sizes, type=_sizes(sizes), help="instead of the sweeps")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="ways to compute the loss (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: results beside this)")
    # As if each shape were the only one: a program for any shape would be slower.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = MOST_COMPILED_SHAPES
    return parser.parse_args()


def chosen(losses: Mapping[str, Callable[..., Any]], providers: Sequence[str] | None) -> dict[str, Callable[..., Any]]:
    """The losses that `--providers` names. One that is not there, such as Liger's where it is not installed, is left
    out; that none is there is an error."""
    if providers is None:
        return dict(losses)
    missing = [name for name in providers if name not in losses]
    if missing:
        print(f"left out: {', '.join(missing)}; there are {', '.join(losses)}", flush=True)
    found = {name: losses[name] for name in providers if name in losses}
    if not found:
        raise SystemExit(f"error: --providers {' '.join(providers)}: none is known here; choose from {list(losses)}")
    return found


def _sizes(names: str) -> Callable[[str], tuple[int, ...]]:
    count = len(names.split("x"))

    def parse(text: str) -> tuple[int, ...]:
        try:
            sizes = tuple(int(part) for part in text.split("x"))
        except ValueError:
            sizes = ()
        if len(sizes) != count or min(sizes) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not {names}, such as {'x'.join(['512'] * count)}")
        return sizes

    return parse
