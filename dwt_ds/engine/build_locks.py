"""Builds in the folder of compiled operators: they are announced, and locks that they left behind are named.

torch builds an extension under a file `lock`. A build that is killed leaves it behind, and whoever needs the extension
next would wait for it forever, without a message.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from torch.utils.file_baton import FileBaton

# A build writes a file at a time, and nvcc takes several minutes for some on a busy machine.
_ABANDONED_SECONDS = 600.0
# The builder has said on this machine that it builds; this is for whoever cannot see that.
_MESSAGE_SECONDS = 120.0
_POLL_SECONDS = 2.0
_TORCHS_TRY_ACQUIRE = FileBaton.try_acquire


def raise_on_abandoned_locks() -> None:
    """From now on torch's wait for an abandoned lock is a ValueError that names the file, and the process that builds
    an operator says so: torch is silent for minutes."""
    FileBaton.wait = _wait  # type: ignore[method-assign,assignment]
    FileBaton.try_acquire = _try_acquire  # type: ignore[method-assign,assignment]


def find_abandoned_locks() -> list[Path]:
    """Locks in the extensions folder whose build has written nothing for 10 minutes."""
    return [lock for lock in sorted(extensions_folder().glob("*/lock")) if _abandoned(lock)]


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
    folder = Path(baton.lock_file_path).parent
    acquired = _TORCHS_TRY_ACQUIRE(baton)
    # A built extension is loaded under the same lock.
    if acquired and not any(folder.glob("*.so")):
        print(f"compiling {folder.name} for this machine, once; it takes a minute or more", file=sys.stderr, flush=True)
    return acquired


def _wait(baton: FileBaton) -> None:
    lock, began, reported = Path(baton.lock_file_path), time.monotonic(), False
    while lock.exists():
        if _abandoned(lock):
            raise ValueError(
                f"{lock}: the lock of a build that was killed, nothing was written there for "
                f"{_ABANDONED_SECONDS / 60:.0f} minutes; delete that file"
            )
        if not reported and time.monotonic() - began > _MESSAGE_SECONDS:
            reported = True
            print(
                f"waiting for another process to build {lock.parent.name}; if none does, delete {lock}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL_SECONDS)


def _abandoned(lock: Path) -> bool:
    """Whether the lock's build has stopped writing. Only its files tell: it may run on another host or in another
    container, where this process cannot see it."""
    try:
        written = max(file.stat().st_mtime for file in lock.parent.iterdir() if not file.is_dir())
    except (FileNotFoundError, ValueError):  # the build has just ended
        return False
    return time.time() - written > _ABANDONED_SECONDS
