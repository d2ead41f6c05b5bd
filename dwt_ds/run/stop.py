"""Reasons to stop a run early: a signal, a request in the run's folder, the death of the launcher.

A rank only notes the reason here. The ranks agree on it (`stop_agreement.py`) with the counts of the next step or at a
validation batch, learn of it one step later, save a checkpoint, and exit together with code 0.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import psutil

from dwt_ds.base.processes import OUR_MODULE, stop_signals

STOP_FILE = "stop"
# Names of programs and modules; of dwt-ds only `launch`.
_LAUNCHERS = {"deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "mpirun", "mpiexec"}
_OURS = {"dwt-ds", OUR_MODULE}
_POLL_SECONDS = 1.0
# How long ranks that were asked to stop still wait for the others at the start. Rank 0, where they meet, ends last:
# the others would end with an error without it.
_MEETING_SECONDS, _RANK_0_SECONDS = 10.0, 5.0


class StopRequest:
    """Whether this rank was asked to stop, and why.

    Args:
        launch: name of the launch that this rank belongs to, "" if it has none. A request in the run's folder may name
            the launch that it is for.
    """

    def __init__(self, launch: str = "") -> None:
        self.reason = ""
        self._launch = launch
        self._began = time.time()

    def listen(self) -> None:
        """From now on SIGTERM, SIGINT and SIGHUP are requests, and the launchers above this process are watched.

        DeepSpeed's launchers pass on few signals, and killing one does not end its ranks: they would keep training
        with nobody to read their output or to stop them.
        """
        for number in stop_signals():
            signal.signal(number, lambda caught, _: self.ask(signal.Signals(caught).name))
        launchers = _launchers_above()
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), daemon=True, name="launcher watch").start()

    def ask(self, reason: str) -> None:
        """Note a reason; the first one counts."""
        self.reason = self.reason or reason

    def is_asked(self, folder: Path | None) -> bool:
        """Whether there is a reason to stop, such as a request in the run's `folder`; None: do not look there."""
        try:
            if folder is not None and self._is_ours(folder / STOP_FILE):
                self.ask("request of the launcher")
        except (OSError, UnicodeDecodeError):
            pass
        return bool(self.reason)

    def _is_ours(self, request: Path) -> bool:
        """Whether a request is for this launch: it names it, or names none and is not from before the start.

        The time of one that names this launch does not count, since the clock of the host that wrote it may be behind.
        """
        named = request.read_text(encoding="utf-8").strip()
        return named == self._launch if named else request.stat().st_mtime >= self._began

    @contextmanager
    def while_ranks_meet(self, folder: Path | None, *, rank: int) -> Iterator[None]:
        """A block in which this rank waits for the others, in C++ code, where a request reaches nobody.

        If one comes, and the ranks do not meet soon after, this process ends there, with code 0.
        """
        met = threading.Event()
        threading.Thread(target=self._end_unmet, args=(met, folder, rank), daemon=True, name="meeting watch").start()
        try:
            yield
        finally:
            met.set()

    def _end_unmet(self, met: threading.Event, folder: Path | None, rank: int) -> None:
        while not self.is_asked(folder):
            if met.wait(_POLL_SECONDS):
                return
        if not met.wait(_MEETING_SECONDS + (0.0 if rank else _RANK_0_SECONDS)):
            exit_alone(0)

    def _watch(self, launchers: list[psutil.Process]) -> None:
        while not self.reason:
            time.sleep(_POLL_SECONDS)
            if not all(_lives(launcher) for launcher in launchers):
                self.ask("death of the launcher")


def exit_alone(code: int) -> NoReturn:
    """End this process without leaving the group: NCCL would wait for the other ranks. The launcher ends those."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _launchers_above() -> list[psutil.Process]:
    """The launchers among this process's ancestors."""
    found = []
    for process in psutil.Process().parents():
        try:
            words = [Path(word).name for word in process.cmdline()[:4]]
        except psutil.Error:
            continue
        if not _LAUNCHERS.isdisjoint(words) or ("launch" in words and not _OURS.isdisjoint(words)):
            found.append(process)
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
