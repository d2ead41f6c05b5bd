"""Waiting for another process to compile an operator, but not for one that was killed while it did."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from torch.utils.file_baton import FileBaton

from dwt_ds.engine.extension_locks import find_locks

_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BEFORE_TELLING = 30.0


def end_waits_for_killed_builds(several_hosts: bool) -> None:
    """From now on torch's wait for a lock that nobody will ever remove is a ValueError that names the file."""

    def wait(self: Any) -> None:
        seen_abandoned, began, told = False, time.monotonic(), False
        while os.path.exists(self.lock_file_path):
            path = os.path.realpath(self.lock_file_path)
            abandoned = [lock for lock in find_locks() if os.path.realpath(lock.path) == path]
            if any(lock.stale(several_hosts) for lock in abandoned):
                # One look may fall between a build's closing of the file and its removal.
                if seen_abandoned:
                    raise ValueError(
                        f"{self.lock_file_path}: the lock of a build that was killed; every start would wait for it "
                        "without end; delete that file"
                    )
                seen_abandoned = True
            if not told and time.monotonic() - began > _SECONDS_BEFORE_TELLING:
                told = True
                print(f"waiting for the build that holds {self.lock_file_path}", file=sys.stderr, flush=True)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    FileBaton.wait = wait  # type: ignore[method-assign]
