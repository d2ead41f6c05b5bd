"""Commands with a time limit, which also end when this process gets a signal to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from dwt_ds.base.processes import stop_signals

# What a process has to clean up after SIGTERM. One that hangs in a call to the GPU cannot handle it.
_GRACE_SECONDS = 5.0
_running: set[subprocess.Popen[str]] = set()
_ending = threading.Event()


def run(
    command: Sequence[str], timeout_seconds: float, environment: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command; 124 once the time is over, with nothing left running here.

    `environment` replaces this process's own.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return 127, "", f"{command[0]}: {error.strerror}"
    _running.add(process)
    if _ending.is_set():  # the signal came while another thread started this one
        _end(process)
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        try:
            out, _ = process.communicate(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _end(process, signal.SIGKILL)
            out, _ = process.communicate()
        return 124, out, f"no answer within {timeout_seconds:.0f} s"
    finally:
        _running.discard(process)
    return process.returncode, out, err


def error_line(output: str) -> str:
    """The last line that names an error, else the last one that is not empty; "" if there is none."""
    lines = [line.strip() for line in reversed(output.splitlines()) if line.strip()]
    return next((line for line in lines if "Error" in line or "error:" in line), lines[0] if lines else "")


def end_commands_on_signals() -> None:
    """On SIGTERM, Ctrl-C and a closed terminal end this process, after the commands that `run` has in any thread.

    These are in sessions of their own, which a signal to this session does not reach.
    """

    def stop(number: int, _: Any) -> None:
        _ending.set()
        for process in list(_running):
            _end(process)
        sys.exit(128 + number)

    for number in stop_signals():
        signal.signal(number, stop)


def _end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
