"""Reasons to stop a run early: a signal, a request in the run's folder, a launcher that has died.

A rank only notes the reason here. The ranks agree on it at the next step (or validation batch), save a checkpoint,
and end together with exit code 0.
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

        DeepSpeed's launchers pass on few signals and outlive, or are outlived by, their ranks: a rank whose launcher
        was killed would train on with nobody to read its output or to stop it.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda caught, _: self.ask(signal.Signals(caught).name))
        launchers = _launchers_above()
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), daemon=True, name="launcher watch").start()

    def ask(self, reason: str) -> None:
        """Note a reason; the first one counts."""
        self.reason = self.reason or reason

    def look_for_file(self, folder: Path) -> None:
        """Rank 0's look at the run's folder, where the launch scripts leave their request."""
        try:
            written = (folder / STOP_FILE).stat().st_mtime
        except OSError:
            return
        if written >= self._began:  # not one that an earlier start left behind
            self.ask("request of the launcher")

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
