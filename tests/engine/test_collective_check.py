"""The timed collective, and that a launch leaves no shared memory behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)

SHARED_MEMORY = Path("/dev/shm")


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_a_collective_over_two_ranks_is_timed_and_leaves_no_shared_memory_behind() -> None:
    port = "29671"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    done = subprocess.run(
        [*command, "--module", "dwt_ds.engine.collective_check"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("dwt-ds collective: "))
    measured = json.loads(line.partition(": ")[2])
    assert (measured["ranks"], len(measured["hosts"])) == (2, 1)
    # Each rank's link carries as much as one rank holds, when there are two.
    assert measured["bus_bytes_per_second"] == pytest.approx(measured["bytes"] / measured["seconds"])
    assert measured["latency_seconds"] > 0
    assert [path.name for path in SHARED_MEMORY.glob(f"*_{port}_*")] == []
