"""The timed collective, the memory that ranks share, and how long their collectives wait."""

from __future__ import annotations

import json

import pytest
from harness.ranks import Run


def test_a_collective_over_two_ranks_is_timed(run_ranks: Run) -> None:
    first, second = run_ranks([["-m", "dwt_ds.engine.collective_check"]] * 2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    line = next(line for line in (first.out + second.out).splitlines() if line.startswith("dwt-ds collective: "))
    measured = json.loads(line.partition(": ")[2])
    assert (measured["ranks"], len(measured["hosts"])) == (2, 1)
    # Each rank's link carries as much as one rank holds, when there are two.
    assert measured["bus_bytes_per_second"] == pytest.approx(measured["bytes"] / measured["seconds"])
    assert measured["latency_seconds"] > 0


def test_ranks_take_no_shared_memory(run_ranks: Run) -> None:
    """DeepSpeed's all-reduce would: 66 MiB a rank, which nothing deletes if a rank ends before the others have come."""
    code = """
from pathlib import Path
from dwt_ds.engine.ranks import start_ranks
start_ranks()
print([line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line])
"""
    ended = run_ranks([["-c", code]] * 2)
    assert [rank.out for rank in ended] == ["[]\n"] * 2, ended


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
