"""The timed collective, what a launch leaves behind, and how long its collectives wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)

SHARED_MEMORY = Path("/dev/shm")
CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_a_collective_over_two_ranks_is_timed_and_leaves_no_shared_memory_behind(port: int) -> None:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    command += ["--module", "dwt_ds.engine.collective_check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, **CPU})
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("dwt-ds collective: "))
    measured = json.loads(line.partition(": ")[2])
    assert (measured["ranks"], len(measured["hosts"])) == (2, 1)
    # Each rank's link carries as much as one rank holds, when there are two.
    assert measured["bus_bytes_per_second"] == pytest.approx(measured["bytes"] / measured["seconds"])
    assert measured["latency_seconds"] > 0
    assert [path.name for path in SHARED_MEMORY.glob(f"*_{port}_*")] == []


def test_the_timeout_holds_for_groups_that_are_made_later() -> None:
    # ZeRO makes its own; a rank would wait in them for a lost host as long as torch's default.
    code = """
import torch, torch.distributed as dist
from dwt_ds.engine.ranks import start_ranks
start_ranks(7.0)
groups = [dist.group.WORLD, dist.new_group([0])]
print([group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **CPU})
    assert done.stdout.splitlines()[-1:] == ["[7.0, 7.0]"], done.stderr
