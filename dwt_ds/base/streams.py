"""Output that cannot fail the process that prints it."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any


def outlive_lost_output() -> None:
    """From now on, what this process cannot print is dropped without an error.

    The log's disk may be full, a Ctrl-C may have ended `tee` as well, the terminal may be closed: a run still has to
    save. Streams that are not the process's own, as in a notebook, stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start (`>&-`)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            lossy = io.BufferedWriter(_LossyFile(stream.fileno(), "w", closefd=False))
            # Letters that the terminal's encoding lacks are printed escaped.
            text = io.TextIOWrapper(lossy, stream.encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, text)


class _LossyFile(io.FileIO):
    def write(self, data: Any) -> int:
        with suppress(OSError):
            written: int | None = super().write(data)
            if written is not None:  # None: a full pipe or terminal that another program has made non-blocking
                return written
        return len(data)
