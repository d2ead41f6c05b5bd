"""A launcher, watched with its run to the end.

DeepSpeed's launchers lose signals, and end with 0 although ranks were killed, or with 1 although all of them ended
well. Here SIGTERM, SIGINT and SIGHUP become a request in the run's folder, which works with every launcher and any
number of hosts; the ranks save and end. So does the loss of a host before the ranks have met. The exit code is 0 if the
run is complete, 75 (try again) if it stopped with a checkpoint to resume from, else the launcher's own.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from dwt_ds.base.files import make_folder, write_text
from dwt_ds.base.locks import current_writer
from dwt_ds.base.processes import stop_signals
from dwt_ds.launch.local import Launch
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.stop import STOP_FILE

STOPPED = os.EX_TEMPFAIL
_POLL_SECONDS = 0.5
_LEFT_OVER_SECONDS = 600.0
# How long the ranks of the other hosts may still take to end by themselves, or to be seen in the run's folder.
_HOST_SECONDS = 20.0


def watch(launch: Launch, arguments: Sequence[str], folder: RunFolder) -> int:
    """Run a launcher with `dwt_ds.pretrain ARGUMENTS` to its end, passing requests to stop to its ranks; the exit code.

    Two launches may be in `folder` at a time, until the second is refused, so a request names the launch it is for.
    """
    asked: list[int] = []
    for number in stop_signals():
        signal.signal(number, lambda caught, _: asked.append(caught))
    name = secrets.token_hex(8)
    command = launch.command("dwt_ds.pretrain", [*arguments, f"--launched_as={name}"])
    began = time.time()
    # In a session of its own, so that a Ctrl-C in the terminal comes here alone.
    process = subprocess.Popen(command, env=launch.environment, start_new_session=True)
    meeting = _Meeting(process.pid, launch, folder)
    while process.poll() is None:
        if asked or meeting.lost_a_host():
            # Repeatedly: another launch may replace the request by its own, and ranks that are still starting ignore an
            # unnamed one that is older than they are.
            _request_stop(folder.path, name)
        time.sleep(_POLL_SECONDS)
    if _requested(folder.path) == name:
        (folder.path / STOP_FILE).unlink(missing_ok=True)
    _end_what_is_left(process.pid)
    if folder.is_complete(process.returncode, began):
        return 0
    if process.returncode > 0:
        return process.returncode
    return 1 if meeting.lost_a_host() else STOPPED


class _Meeting:
    """Whether a host's ranks have ended before all ranks had met.

    pdsh then waits for the other hosts, whose ranks wait for those that ended. (mpirun and srun end all of them.) The
    ranks have met once one of them writes in the folder; where a file system cannot tell, nothing is done.
    """

    def __init__(self, launcher: int, launch: Launch, folder: RunFolder) -> None:
        self._launcher, self._folder = launcher, folder
        self._hosts = len(launch.hosts) if launch.launcher == "pdsh" else 0
        self._since: float | None = None
        self._over = not self._hosts
        self._lost = False

    def lost_a_host(self) -> bool:
        """To be called until the launcher ends; says so once on stderr."""
        if self._over or self._lost:
            return self._lost
        connections = self._connections()
        if connections is None or connections >= self._hosts:
            self._since = None
        elif current_writer(self._folder.path) is not None:
            self._over = True
        elif self._since is None:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > _HOST_SECONDS:
            self._lost = True
            lost = self._hosts - connections
            print(
                f"error: {lost} of {self._hosts} hosts ended before all ranks had met (see their lines above); ending "
                "the others",
                file=sys.stderr,
                flush=True,
            )
        return self._lost

    def _connections(self) -> int | None:
        """Hosts whose ssh still runs; None while there is no pdsh."""
        with suppress(psutil.Error):
            for child in psutil.Process(self._launcher).children(recursive=True):
                if child.name().startswith("pdsh"):  # Debian has pdsh.bin
                    alive = [each for each in child.children() if each.status() != psutil.STATUS_ZOMBIE]
                    return sum(each.name() == "ssh" for each in alive)
        return None


def _request_stop(folder: Path, launch: str) -> None:
    make_folder(folder, mode=0o700)
    if _requested(folder) == launch:
        (folder / STOP_FILE).touch()
        return
    try:
        write_text(folder / STOP_FILE, launch)
    except OSError:
        # A full disk still has room for an empty file, a request to all who write here.
        (folder / STOP_FILE).touch()


def _requested(folder: Path) -> str | None:
    """The launch that a request in the folder is for."""
    with suppress(OSError, UnicodeDecodeError):
        return (folder / STOP_FILE).read_text(encoding="utf-8")
    return None


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
    # As a container's first process we inherit orphans and must reap them.
    with suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    return any(_lives_in(group, process) for process in psutil.process_iter())


def _lives_in(group: int, process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False
