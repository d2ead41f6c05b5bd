"""What the launch scripts start: a launcher's command, watched, with an exit code that can be believed.

python -m dwt_ds.launch.supervise RECIPE [key=value ...] -- COMMAND ...

DeepSpeed's launchers lose signals, and end with 0 although ranks were killed, or with 1 although all of them ended
well. Here SIGTERM and SIGINT become a request in the run's folder, which every kind of launcher lets through, on any
number of hosts; the ranks save and end. The exit code is 0 if the run is complete, 75 (try again) if it stopped with a
checkpoint to go on from, else the command's own.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from dwt_ds.config.recipe import load_recipe
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.stop import STOP_FILE

STOPPED = 75
_POLL_SECONDS = 0.5
_LEFT_OVER_SECONDS = 600.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command to its end."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--" not in arguments:
        print(
            "error: no command; write: python -m dwt_ds.launch.supervise RECIPE [key=value ...] -- COMMAND",
            file=sys.stderr,
        )
        return 2
    middle = arguments.index("--")
    parser = argparse.ArgumentParser(prog="dwt_ds.launch.supervise")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--deepspeed_config")
    options = parser.parse_intermixed_args(arguments[:middle])
    try:
        folder = RunFolder(load_recipe(options.recipe, options.overrides).config.output_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return watch(arguments[middle + 1 :], folder)


def watch(command: list[str], folder: RunFolder) -> int:
    """Run `command` to its end, passing requests to stop to the run in `folder`."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _: asked.append(caught))
    began = time.time()
    # In a session of its own, so that a Ctrl-C in the terminal comes here alone.
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None:
        if asked:
            # Again and again: ranks that are still starting take an old file for a former start's.
            _request_stop(folder.path)
        time.sleep(_POLL_SECONDS)
    (folder.path / STOP_FILE).unlink(missing_ok=True)
    _end_what_is_left(process.pid)
    if folder.is_complete(process.returncode, began):
        return 0
    return process.returncode if process.returncode > 0 else STOPPED


def _request_stop(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
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
    """Whether a process of the group does anything yet; dead ones that nobody reaps stay in it."""
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


if __name__ == "__main__":
    sys.exit(main())
