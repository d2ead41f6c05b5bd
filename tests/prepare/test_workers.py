"""Work spread over processes: order, bounded look-ahead, and deaths on either side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dwt_ds.prepare.workers import ordered_map


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_items_are_taken_as_needed(workers: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(-50, 0):
            taken += 1
            yield item

    results = ordered_map(abs, items(), workers)
    assert [next(results) for _ in range(10)] == list(range(50, 40, -1))
    assert taken <= 10 + 2 * workers
    assert list(results) == list(range(40, 0, -1))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_reaches_the_caller(workers: int) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(ordered_map(int, ["1", "2", "three", "4"], workers))


def test_a_killed_worker_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match="a worker process was killed .*fewer than 2 workers"):
        list(ordered_map(os._exit, [9], 2))


PARENT = """
    import os, sys, time
    from pathlib import Path
    from dwt_ds.prepare.workers import ordered_map

    if __name__ == "__main__":
        work = ordered_map(os.path.exists, [sys.argv[1]] * 3 + ["x"] * 1000, 2)
        for number, _ in enumerate(work):
            if number == 2:
                children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
                Path(sys.argv[1]).write_text(children)
                time.sleep(60)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script, children_file = tmp_path / "parent.py", tmp_path / "children"
    script.write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen([sys.executable, str(script), str(children_file)])
    deadline = time.monotonic() + 60
    while not (children_file.exists() and children_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = [int(pid) for pid in children_file.read_text().split()]
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
