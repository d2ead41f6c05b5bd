"""Commands that are watched to their end, their output in a log or printed here."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dwt_ds.base.processes import stop_signals

_POLL_SECONDS = 0.5
_LINES_KEPT = 100


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM, Ctrl-C and a closed terminal set while the block runs; for the main thread."""
    stop = threading.Event()
    numbers = stop_signals()
    former = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, former):
            signal.signal(number, handler)


def run_logged(command: Sequence[str], log: Path, stop: threading.Event) -> int:
    """Run `command` with its output appended to `log`; its exit code.

    Once `stop` is set, the command gets a SIGTERM, and its end is waited for.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as output:
        process = subprocess.Popen(
            list(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that a Ctrl-C in the terminal comes here alone
        )
        while not stop.is_set():
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_SECONDS)
        process.terminate()
        return process.wait()


def run_printed(command: Sequence[str]) -> tuple[int, list[str]]:
    """Run `command` and print its lines here as they come, also in a notebook; its exit code and its last lines.

    A KeyboardInterrupt becomes a SIGTERM for the command, whose end is waited for, and is then raised again.
    """
    lines: deque[str] = deque(maxlen=_LINES_KEPT)
    with subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        interrupted = False
        while True:
            try:
                line = process.stdout.readline()
            except KeyboardInterrupt:
                interrupted = True
                process.terminate()
                continue
            if not line:
                break
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode, list(lines)
