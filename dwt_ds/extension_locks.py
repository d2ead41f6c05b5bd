"""Locks in the folder of compiled operators.

torch builds an extension under a file `lock`; a build that is killed leaves it, and whoever wants the extension next
waits for it without end and without a word.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Other hosts may share the folder, and what they hold open cannot be seen from here.
_AGE_SECONDS = 1800.0


@dataclass(frozen=True)
class Lock:
    """A lock file that stands now."""

    path: str
    operator: str
    """Name of the extension that is, or was, being built."""
    held: bool
    """Whether a process on this host has it open, as the building one does."""
    age_seconds: float

    def stale(self, several_hosts: bool) -> bool:
        """Whether nobody will ever remove it."""
        return not self.held and (not several_hosts or self.age_seconds > _AGE_SECONDS)


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


def find_locks() -> list[Lock]:
    """All locks in that folder."""
    paths = sorted(extensions_folder().glob("*/lock"))
    opened = _open_files() if paths else set()
    locks = []
    for path in paths:
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # the build has just ended
            continue
        locks.append(Lock(str(path), path.parent.name, str(path.resolve()) in opened, age))
    return locks


def _open_files() -> set[str]:
    """Paths that processes on this host have open, as far as this user may see."""
    opened = set()
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            for descriptor in descriptors.iterdir():
                opened.add(os.readlink(descriptor))
        except OSError:  # the process has ended, or is another user's
            continue
    return opened
