"""What the benchmarks of the two forms share: their command line, and the way through their shapes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from measure import DEVICE, Results, Timing, device_name, draw, versions

# torch.compile gives up on a function after 8 shapes, and would run it uncompiled without a word.
MOST_COMPILED_SHAPES = 64
# Eager torch needs 80 GB at 65,536 rows.
MOST_EAGER_ROWS = 20_000
Shape = TypeVar("Shape", bound=Any)
Losses = Mapping[str, Callable[..., Any]]


def parse_options(doc: str | None, shape: type[Shape]) -> argparse.Namespace:
    """`rounds`, `shapes` (None, or a list of them), `providers` (None: all) and `out` (None: the folder results)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20 if DEVICE == "cuda" else 5)
    sizes = "x".join(field.upper() for field in shape._fields)
    parser.add_argument("--shapes", nargs="+", metavar=sizes, type=_parser_of(shape, sizes), help="not the sweeps")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="ways to compute the loss (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: results beside this)")
    # As if each shape were the only one: a program for any shape would be slower.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = MOST_COMPILED_SHAPES
    return parser.parse_args()


def measure_shapes(
    name: str,
    options: argparse.Namespace,
    sweeps: Mapping[str, Sequence[Shape]],
    losses: Losses,
    measure: Callable[[Shape, Losses, int], Iterable[tuple[str, Timing, dict[str, float]]]],
) -> None:
    """Measures the losses at each shape that the CSV file does not have, and writes it; of the sweeps also a figure.

    Args:
        measure: name, timing and further columns of each of the losses at a shape, by so many rounds.
    """
    losses, results = chosen(losses, options.providers), Results(name, options.out, options.rounds)
    for sweep, shapes in ({"given": options.shapes} if options.shapes else sweeps).items():
        for sizes in shapes:
            shape = {"sweep": sweep, **sizes._asdict()}
            ways = {way: loss for way, loss in losses.items() if "eager" not in way or sizes.rows <= MOST_EAGER_ROWS}
            if results.has(ways, shape):
                continue
            made_with = {"device": device_name(), "versions": versions()}
            lines = [
                {"kernel": name.replace("_", " "), "provider": way, **made_with, **shape, "dtype": "bfloat16"}
                | timing.rounded()
                | {**columns, "rounds": options.rounds}
                for way, timing, columns in measure(sizes, ways, options.rounds)
            ]
            results.add(lines, shape)
    print(results.path)
    if not options.shapes:
        print(draw(results.path, results.lines, {"rows": "rows (V = 30,522)", "vocabulary": "vocabulary"}))


def chosen(losses: Losses, providers: Sequence[str] | None) -> Losses:
    """The losses that `--providers` names. One that is not there, such as Liger's where it is not installed, is left
    out; that none is there is an error."""
    if providers is None:
        return losses
    missing = [name for name in providers if name not in losses]
    if missing:
        print(f"left out: {', '.join(missing)}; there are {', '.join(losses)}", flush=True)
    found = {name: losses[name] for name in providers if name in losses}
    if not found:
        raise SystemExit(f"error: --providers {' '.join(providers)}: none is known here; choose from {list(losses)}")
    return found


def _parser_of(shape: type[Shape], names: str) -> Callable[[str], Shape]:
    count = len(shape._fields)

    def parse(text: str) -> Shape:
        try:
            sizes = tuple(int(part) for part in text.split("x"))
        except ValueError:
            sizes = ()
        if len(sizes) != count or min(sizes) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not {names}, such as {'x'.join(['512'] * count)}")
        return shape(*sizes)

    return parse
