"""One writer a folder: a second is refused, with the name of the first.

The lock is a POSIX record lock on a small file, so the kernel (on NFS: the file server) drops it when its owner ends,
however that happens. Processes that the owner forks do not have it, unlike one of `flock`: a loader process that
outlives a killed run blocks nobody. The file's contents are for messages only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dwt_ds.base.files import through_links
from dwt_ds.base.software import host_name

LOCK_NAME = ".writer"
# What `current_writer` says where it cannot tell.
NOT_KNOWN = "not known, this file system has no locks"
# The owner may be about to end: a killed process has gigabytes to give back, a rank whose launcher was killed saves.
_WAIT_SECONDS = 10.0
_POLL_SECONDS = 0.05
# A file system without locks: Lustre mounted without `flock`, NFSv3 without lockd, some FUSE.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# The locks of this process: a record lock does not exclude the process that has it, and closing any handle of its file
# ends it.
_HELD: dict[Path, FolderLock] = {}


class OccupiedError(ValueError):
    """Another process writes there."""


@dataclass(frozen=True)
class _Owner:
    """Who holds a lock, as the lock's file says."""

    host: str
    process: int
    since: str

    @classmethod
    def this_process(cls) -> _Owner:
        return cls(host_name(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))

    @classmethod
    def read(cls, path: Path) -> _Owner | None:
        """None while the owner has not written it yet, or could not."""
        with suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        return None


class FolderLock:
    """The right to write to a folder. It ends with `release`, with the block, or with this process.

    Args:
        folder: created, with those above it, if it does not exist.
        option: how the user named the folder, to begin the message: "--out runs/a".
        name: of the lock's file in the folder.
        mode: of folders that are created.

    Raises:
        OccupiedError: another process has it, and still has it after 10 seconds; one line with host, process and
            since when.
        OSError: the lock's file cannot be written.
    """

    def __init__(self, folder: Path, option: str, *, name: str = LOCK_NAME, mode: int = 0o777) -> None:
        self._path = through_links(folder) / name
        self._mode = mode
        folders = (self._path.parent, *self._path.parent.parents)
        self._created = [folder for folder in folders if not folder.exists()]
        self._descriptor: int | None = None
        if self._path in _HELD:
            raise OccupiedError(f"{option}: this process, {os.getpid()}, writes there already; name another folder")
        began = time.monotonic()
        while not self._try(option):
            if time.monotonic() - began > _WAIT_SECONDS:
                owner = _described(_Owner.read(self._path))
                raise OccupiedError(f"{option}: {owner}; wait until it ends, stop it, or name another folder")
            time.sleep(_POLL_SECONDS)
        _HELD[self._path] = self

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def require(self, option: str) -> None:
        """Raise OccupiedError if another process has become the writer meanwhile.

        If the owner is cut off from the file server for long enough, the server gives the lock away while it lives on.
        """
        if self._descriptor is None:  # a file system without locks
            return
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # the server cannot be reached; what is written next will tell
            raise OccupiedError(
                f"{option}: while this host was cut off from the file server, another process took over this folder "
                "and writes there now; this one ends"
            ) from None

    def release(self) -> None:
        """Give it back: its file goes, and so do folders that were created for it and are still empty."""
        _HELD.pop(self._path, None)
        if self._descriptor is None:
            return
        # Removed while it is locked: a process that has opened this file meanwhile sees that it has no name any more.
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        with suppress(OSError):
            for created in self._created:
                created.rmdir()

    def _try(self, option: str) -> bool:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=self._mode)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the former owner has just removed the empty folder
            return False
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise type(error)(
                f"{option}: this user cannot write there ({error.strerror}: {error.filename}); name another folder, or "
                "let this user write to it"
            ) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"warning: {option}: this file system has no locks ({error.strerror}); nothing keeps a second process "
                "from writing there",
                file=sys.stderr,
                flush=True,
            )
            return True
        if not self._is_named(descriptor):
            os.close(descriptor)
            return self._try(option)
        self._descriptor = descriptor
        with suppress(OSError):  # a full disk
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(vars(_Owner.this_process())).encode(), 0)
            os.fsync(descriptor)  # on NFS it would come to the other hosts half a minute later, or never
        return True

    def _is_named(self, descriptor: int) -> bool:
        """Whether the open file still has its name; the former owner removes it when it ends well."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        return False


def current_writer(folder: Path) -> str | None:
    """Who writes to a folder now, in words; None if nobody does.

    It asks the kernel or the file server and takes no lock, so it blocks nobody and needs no right to write.
    """
    path = through_links(folder) / LOCK_NAME
    if path in _HELD:  # opening the file here and closing it would end the lock
        return f"process {os.getpid()} on host {host_name()}"
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # struct flock: type, whence, start, length (0: to the end), process.
        question = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        (kind,) = struct.unpack_from("h", fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return NOT_KNOWN
    finally:
        os.close(descriptor)
    if kind == fcntl.F_UNLCK:
        return None
    owner = _Owner.read(path)
    return "a process" if owner is None else f"process {owner.process} on host {owner.host} since {owner.since}"


def release_locks() -> None:
    """Give back all that this process holds, at an orderly end."""
    for lock in list(_HELD.values()):
        lock.release()


def _described(owner: _Owner | None) -> str:
    if owner is None:
        return "another process writes there"
    elsewhere = (
        "" if owner.host == host_name() else " (if that machine is lost, the file server frees it in a minute or two)"
    )
    return f"process {owner.process} on host {owner.host} has been writing there since {owner.since}{elsewhere}"
