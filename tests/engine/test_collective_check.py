"""The timed collective, what a launch leaves behind, and how long its collectives wait."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.ranks import Run

from dwt_ds.base.ports import reserve_port

SHARED_MEMORY = Path("/dev/shm")


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_a_collective_over_two_ranks_is_timed_and_leaves_no_shared_memory_behind(run_ranks: Run) -> None:
    port = reserve_port()
    words = [["-m", "dwt_ds.engine.collective_check"]] * 2
    first, second = run_ranks(words, environment={"MASTER_PORT": str(port)})
    assert (first.code, second.code) == (0, 0), first.err + second.err
    line = next(line for line in (first.out + second.out).splitlines() if line.startswith("dwt-ds collective: "))
    measured = json.loads(line.partition(": ")[2])
    assert (measured["ranks"], len(measured["hosts"])) == (2, 1)
    # Each rank's link carries as much as one rank holds, when there are two.
    assert measured["bus_bytes_per_second"] == pytest.approx(measured["bytes"] / measured["seconds"])
    assert measured["latency_seconds"] > 0
    assert [path.name for path in SHARED_MEMORY.glob(f"*_{port}_*")] == []


def test_the_timeout_holds_for_groups_that_are_made_later(run_ranks: Run) -> None:
    # ZeRO makes its own; a rank would wait in them for a lost host as long as torch's default.
    code = """
import torch, torch.distributed as dist
from dwt_ds.engine.ranks import start_ranks
start_ranks(7.0)
groups = [dist.group.WORLD, dist.new_group([0])]
print([group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups])
"""
    [done] = run_ranks([["-c", code]])
    assert done.out.splitlines()[-1:] == ["[7.0, 7.0]"], done.err
