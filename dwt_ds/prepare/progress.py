"""A progress bar with rate and time left; now and then a line where the output is no terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Progress over parts that follow one another, each counted from 0."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        """total: of all parts, or None where it is not known."""
        interactive = sys.stderr.isatty()
        self._done = 0
        self._bar = tqdm(
            total=total,
            desc=title,
            unit=unit,
            unit_scale=True,
            file=sys.stderr,
            mininterval=0.2 if interactive else _SECONDS_BETWEEN_LINES,
            ncols=None if interactive else 100,
            leave=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def at(self, position: int) -> None:
        """The part under way has come to `position`."""
        self._bar.update(self._done + position - self._bar.n)

    def done(self, size: int) -> None:
        """The part under way, of `size`, is over."""
        self._done += size
        self._bar.update(self._done - self._bar.n)
