"""A curve in a terminal, as columns of block characters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def block_curve(xs: Sequence[float], ys: Sequence[float], *, width: int, height: int) -> list[str]:
    """Lines of a chart, the highest values on top, with the range of each axis.

    Args:
        xs, ys: two or more points, by growing x.
        width: columns of the terminal.
        height: lines of the curve; two more have the range of x.
    """
    low, high = min(ys), max(ys)
    labels = [f"{value:.4g}" for value in (high, low)]
    left = max(map(len, labels))
    columns = np.interp(np.linspace(xs[0], xs[-1], max(2, width - left - 2)), xs, ys)
    # From one eighth to the full height, so that the lowest value is visible.
    eighths = [1 + round((8 * height - 1) * (value - low) / (high - low or 1.0)) for value in columns]
    lines = []
    for row in range(height - 1, -1, -1):
        label = labels[0] if row == height - 1 else labels[1] if row == 0 else ""
        lines.append(f"{label:>{left}} │{''.join(_EIGHTHS[min(8, max(0, each - 8 * row))] for each in eighths)}")
    ends = f"{xs[0]:,.0f}", f"step {xs[-1]:,.0f}"
    lines.append(f"{'':>{left}} └{'─' * len(columns)}")
    lines.append(f"{'':>{left}}  {ends[0]}{ends[1]:>{max(1, len(columns) - len(ends[0]))}}")
    return lines
