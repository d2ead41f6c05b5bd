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

import psutil

# Builds write a file at a time, and nvcc takes a minute or two for some.
_AGE_SECONDS = 600.0
# File systems that no other host writes to.
_LOCAL_FILE_SYSTEMS = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
# The kernel's number for the namespace of processes that contains all others.
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


@dataclass(frozen=True)
class Lock:
    """A lock file that stands now."""

    path: str
    operator: str
    """Name of the extension that is, or was, being built."""
    held: bool
    """Whether a process that can be seen from here has it open, as the building one does."""
    all_seen: bool
    """Whether every process that may have it open can be seen: none on another host, in another container, or of
    another user."""
    age_seconds: float
    """Since the build last wrote something."""

    def stale(self, several_hosts: bool) -> bool:
        """Whether nobody will ever remove it."""
        known_dead = self.all_seen and not several_hosts
        return not self.held and (known_dead or self.age_seconds > _AGE_SECONDS)


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
        held = str(path.resolve()) in opened
        try:
            all_seen = _all_seen(path)
            age = time.time() - max(file.stat().st_mtime for file in path.parent.iterdir() if not file.is_dir())
        except (FileNotFoundError, ValueError):  # the build has just ended
            continue
        locks.append(Lock(str(path), path.parent.name, held, all_seen, age))
    return locks


def _all_seen(path: Path) -> bool:
    """Whether `_open_files` finds whoever may have `path` open."""
    where = path.resolve()
    disks = [disk for disk in psutil.disk_partitions(all=True) if where.is_relative_to(disk.mountpoint)]
    # Of those mounted over one another the last one counts.
    file_system = max(enumerate(disks), key=lambda each: (len(each[1].mountpoint), each[0]))[1].fstype if disks else ""
    # A container's own layer is an overlay, which no process outside of it writes to.
    everyone = file_system == "overlay" or os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE
    ours = os.geteuid() in (0, path.stat().st_uid)
    return file_system in _LOCAL_FILE_SYSTEMS and everyone and ours


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
