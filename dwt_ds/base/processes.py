"""Processes started by this one, and the words that start them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from os import PathLike
from pathlib import Path

# `python -m dwt_ds` is the command dwt-ds.
OUR_MODULE = "dwt_ds"


def own_command(*arguments: str) -> list[str]:
    """The words that start `dwt-ds ARGUMENTS` as a process of its own, with this Python."""
    return [sys.executable, "-m", OUR_MODULE, *arguments]


def own_programs_first(path: str) -> str:
    """A PATH on which this Python's programs come first; another version of ninja would compile all operators again."""
    programs = str(Path(sys.executable).parent)
    return path if path.split(os.pathsep)[0] == programs else os.pathsep.join([programs, path])


def path_argument(path: str | PathLike[str]) -> str:
    """A path as a word of a command line; one that begins with a dash, and would be an option, gets a `./`."""
    return os.path.join(os.curdir, path) if str(path).startswith("-") else str(path)


def home_path(word: str) -> Path:
    """A path from a command line; `~` is the home folder, also in --out=~/DIR, which shells leave as it is."""
    return Path(word).expanduser()


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a process to end: SIGTERM, Ctrl-C, and a closed terminal, unless started under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


def exit_with_parent() -> None:
    """In a process of `multiprocessing`: exit when the parent does, also when it is killed.

    Workers of a pool would otherwise wait for it forever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
