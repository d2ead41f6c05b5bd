"""Which processes of a launcher are waited for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dwt_ds.launch import supervise


@pytest.fixture
def zombie_group() -> Iterator[int]:
    """A process group whose only process is dead, and not reaped by its parent."""
    parent = (
        "import os, time\n"
        "child = os.fork()\n"
        "if child == 0:\n    os.setsid(); os._exit(0)\n"
        "os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)\n"
        "print(child, flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield int(process.stdout.readline())
    process.kill()
    process.communicate()


def test_dead_processes_that_nobody_reaps_are_not_waited_for(zombie_group: int) -> None:
    os.killpg(zombie_group, 0)  # it is still there
    assert not supervise._group_lives(zombie_group)


def test_processes_that_work_are_waited_for() -> None:
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        assert supervise._group_lives(process.pid)
    finally:
        process.kill()
        process.wait()
    assert not supervise._group_lives(process.pid)


SUBREAPER = """
import ctypes, os, subprocess, time
from dwt_ds import supervise
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
launcher = subprocess.Popen(["sh", "-c", "sleep 0.3 & exit 0"], start_new_session=True)
launcher.wait()
give_up = time.monotonic() + 20
while supervise._group_lives(launcher.pid) and time.monotonic() < give_up:
    time.sleep(0.05)
print("waited too long" if time.monotonic() > give_up else "seen")
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("nothing to reap")
"""


def test_the_first_process_of_a_container_reaps_what_ranks_leave() -> None:
    """As which this one gets orphans for children (PR_SET_CHILD_SUBREAPER)."""
    done = subprocess.run([sys.executable, "-c", SUBREAPER], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["seen", "nothing to reap"], done
