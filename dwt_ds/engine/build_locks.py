"""Locks in the folder of compiled operators: a killed process blocks no other.

Before version 2.14, torch builds an extension under a file `lock`, and loads it under the same file at every start. A
process that is killed then leaves it behind, and the next process that needs the extension would wait for it forever,
without a message. So processes of this package hold a record lock on that file, which ends with them. The locks of
later versions end with their process, and the file stays.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch.utils.file_baton import FileBaton

TORCHS_LOCKS_END = torch.__version__ >= "2.14"
"""Whether torch's own locks end with their process."""
# A build writes a file at a time, and nvcc takes several minutes for some.
_ABANDONED_SECONDS = 600.0
# The process that builds prints that it does; this is for users who do not see its output.
_MESSAGE_SECONDS = 120.0
_POLL_SECONDS = 2.0
_TORCHS_TRY_ACQUIRE = FileBaton.try_acquire
# What the file says while, or since, a process has held the record lock; torch leaves it empty.
_HELD = b"held by a record lock\n"


def replace_torchs_build_locks() -> None:
    """Change how torch handles its build locks, from now on; from torch 2.14 on, nothing has to be changed.

    The lock of a process that was killed while it loaded an operator is ignored. The lock of a killed build raises a
    ValueError that names the file; torch would wait for it forever. A process that waits for a build that is stopped or
    fails gets a ValueError, too; torch would load what is not there.
    """
    if not TORCHS_LOCKS_END:
        FileBaton.wait = _wait  # type: ignore[method-assign,assignment]
        FileBaton.try_acquire = _try_acquire  # type: ignore[method-assign,assignment]


def find_abandoned_locks() -> list[Path]:
    """Locks in the extensions folder that stop a run: their build has written nothing for 10 minutes, and is not seen
    to run."""
    if TORCHS_LOCKS_END:
        return []
    locks = sorted(extensions_folder().glob("*/lock"))
    return [lock for lock in locks if not is_built(lock.parent) and _abandoned(lock)]


def is_built(folder: Path) -> bool:
    """Whether the extension in its `folder` has been compiled."""
    return any(folder.glob("*.so"))


def extensions_folder() -> Path:
    """Where torch puts the extensions that this Python compiles, each in a folder of its name."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen is not None:
        return Path(chosen)
    from torch import version
    from torch.utils.cpp_extension import get_default_build_root

    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    built_for = f"rocm{version.hip}" if version.hip else f"cu{version.cuda}" if version.cuda else "cpu"
    return Path(get_default_build_root(), f"{python}_{built_for.replace('.', '')}")


def _try_acquire(baton: FileBaton) -> bool | None:
    acquired = _TORCHS_TRY_ACQUIRE(baton)
    if acquired:
        _hold(baton)
    return acquired


def _hold(baton: FileBaton) -> None:
    """Take the record lock on torch's file; torch closes the handle when it removes the file."""
    torchs: int = baton.fd  # type: ignore[assignment]
    os.close(torchs)  # closed later, it would end the lock
    descriptor = os.open(baton.lock_file_path, os.O_RDWR)
    baton.fd = descriptor  # type: ignore[assignment]
    with suppress(OSError):  # a file system without locks, or a full one: the file stays empty, as torch leaves it
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, _HELD)


def _wait(baton: FileBaton) -> None:
    lock, began, reported = Path(baton.lock_file_path), time.monotonic(), False
    while lock.exists():
        # A killed build may have a compiler that still writes.
        if is_built(lock.parent) and _holder(lock, remove=True) == "ended":
            return
        if _abandoned(lock):
            if is_built(lock.parent):  # left by another program that loaded it, or by torch 2.14
                lock.unlink(missing_ok=True)
                return
            raise ValueError(
                f"{lock}: left by a build that was killed (nothing written for {_ABANDONED_SECONDS / 60:.0f} minutes); "
                "delete that file"
            )
        if not reported and time.monotonic() - began > _MESSAGE_SECONDS:
            reported = True
            print(
                f"waiting for another process to build {lock.parent.name}; if none does, delete {lock}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL_SECONDS)
    if not is_built(lock.parent):
        raise ValueError(
            f"{lock.parent}: the process that compiled {lock.parent.name} was stopped or failed (see its own output); "
            "start again"
        )


def _holder(lock: Path, *, remove: bool = False) -> Literal["lives", "ended", "not seen"]:
    """What is seen of the process that took the lock's record lock, here or on another host.

    With `remove` the file of one that ended is deleted, unless another process has taken it since.
    """
    with suppress(OSError), open(lock, "r+b") as file:  # it has just ended well, or is another user's
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # other errors: a file system without locks
            return "lives"
        if file.read() == _HELD:
            if remove and os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                lock.unlink()
            return "ended"
    return "not seen"


def _abandoned(lock: Path) -> bool:
    """Whether the lock's build has stopped writing, and no process is seen to hold the record lock. One that is not
    seen may run on another host or in another container."""
    try:
        # The lock first: without it the other files' age says nothing.
        files = [lock, *(file for file in lock.parent.iterdir() if not file.is_dir())]
        written = max(file.stat().st_mtime for file in files)
    except FileNotFoundError:  # the build has just ended
        return False
    # On a busy machine the compiler may take longer for a single file.
    return time.time() - written > _ABANDONED_SECONDS and _holder(lock) != "lives"
