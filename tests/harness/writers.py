"""Processes that write to a folder, which nobody else may meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from dwt_ds.base.locks import FolderLock
lock = FolderLock(Path(sys.argv[1]), "--out x", name=sys.argv[2])
{then}
print(os.getpid(), flush=True)
time.sleep(600)
"""
# Its parent prints the owner's id and lives on.
UNDER_A_LAUNCHER = """
import subprocess, sys
owner = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
owner.wait()
"""
Hold = Callable[..., int]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """`hold(folder)` starts a process that has the folder; its id. `then` is what it does with the lock in hand."""
    started = []

    def start(folder: Path, name: str = ".writer", then: str = "", under_a_launcher: bool = False) -> int:
        words = [*([UNDER_A_LAUNCHER] if under_a_launcher else []), HOLD.format(then=then), str(folder), name]
        process = subprocess.Popen(
            [sys.executable, "-c", *words], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children as well
        process.communicate()
