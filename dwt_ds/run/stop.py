"""Reasons to stop a run early: a signal, a request in the run's folder, the death of the launcher.

A rank only notes the reason here. The ranks agree on it (`stop_agreement.py`) with the counts of the next step or at a
validation batch, learn of it one step later, save a checkpoint, and exit together with code 0.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import psutil

STOP_FILE = "stop"
# Names of programs and modules; of dwt-ds only `launch`.
_LAUNCHERS = {"deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "mpirun", "mpiexec"}
_OURS = {"dwt-ds", "dwt_ds.cli.main"}
_POLL_SECONDS = 1.0


class StopRequest:
    """Whether this rank was asked to stop, and why."""

    def __init__(self) -> None:
        self.reason = ""
        self._began = time.time()

    def listen(self) -> None:
        """From now on SIGTERM and SIGINT are requests, and the launchers above this process are watched.

        DeepSpeed's launchers pass on few signals, and killing one does not end its ranks: they would keep training
        with nobody to read their output or to stop them.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda caught, _: self.ask(signal.Signals(caught).name))
        launchers = _launchers_above()
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), daemon=True, name="launcher watch").start()

    def ask(self, reason: str) -> None:
        """Note a reason; the first one counts."""
        self.reason = self.reason or reason

    def is_asked(self, folder: Path | None) -> bool:
        """Whether there is a reason to stop.

        Args:
            folder: of the run, where launch scripts leave their request; None: do not look there.
        """
        try:
            # An older file was left behind by an earlier start.
            if folder is not None and (folder / STOP_FILE).stat().st_mtime >= self._began:
                self.ask("request of the launcher")
        except OSError:
            pass
        return bool(self.reason)

    def _watch(self, launchers: list[psutil.Process]) -> None:
        while not self.reason:
            time.sleep(_POLL_SECONDS)
            if not all(_lives(launcher) for launcher in launchers):
                self.ask("death of the launcher")


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
