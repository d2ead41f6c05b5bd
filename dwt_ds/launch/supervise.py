"""Commands that are watched to their end: a launcher with its run, and programs whose output goes to a log.

DeepSpeed's launchers lose signals, and end with 0 although ranks were killed, or with 1 although all of them ended
well. Here SIGTERM and SIGINT become a request in the run's folder, which works with every launcher and any number of
hosts; the ranks save and end. The exit code is 0 if the run is complete, 75 (try again) if it stopped with a checkpoint
to resume from, else the launcher's own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from dwt_ds.base.files import make_folder
from dwt_ds.base.locks import NOT_KNOWN, current_writer
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.stop import STOP_FILE

STOPPED = 75
_POLL_SECONDS = 0.5
_LEFT_OVER_SECONDS = 600.0
_LINES_KEPT = 100


def watch(command: Sequence[str], environment: Mapping[str, str], folder: RunFolder) -> int:
    """Run a launcher to its end, passing requests to stop to the run in `folder`; the exit code.

    A request is not for a run that was in the folder already: this launch will be refused there, and its launcher is
    ended instead.
    """
    asked: list[int] = []
    other = _writer(folder)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _: asked.append(caught))
    began = time.time()
    # In a session of its own, so that a Ctrl-C in the terminal comes here alone.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    while process.poll() is None:
        if asked and other is not None and _writer(folder) == other:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        elif asked:
            # Again and again: ranks that are still starting take an old file for a former start's.
            _request_stop(folder.path)
        time.sleep(_POLL_SECONDS)
    if other is None or _writer(folder) != other:
        (folder.path / STOP_FILE).unlink(missing_ok=True)
    _end_what_is_left(process.pid)
    if folder.is_complete(process.returncode, began):
        return 0
    return process.returncode if process.returncode > 0 else STOPPED


def _writer(folder: RunFolder) -> str | None:
    """Who runs in the folder now, in words; None if no process does, or if the file system cannot tell."""
    writer = current_writer(folder.path)
    return None if writer == NOT_KNOWN else writer


def _request_stop(folder: Path) -> None:
    make_folder(folder, mode=0o700)
    (folder / STOP_FILE).touch()


def _end_what_is_left(session: int) -> None:
    """Ranks that outlived a killed launcher save and end by themselves (stop.py); those that do not are killed."""
    give_up = time.monotonic() + _LEFT_OVER_SECONDS
    while _group_lives(session):
        if time.monotonic() > give_up:
            with suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _group_lives(group: int) -> bool:
    """Whether a process of the group still runs; zombies stay in the group."""
    with suppress(ChildProcessError):  # ours are those that lost their parent where this is a container's first process
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return any(_lives_in(group, process) for process in psutil.process_iter())


def _lives_in(group: int, process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set while the block runs; for the main thread."""
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
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
