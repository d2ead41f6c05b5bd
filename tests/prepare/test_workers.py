"""Work spread over processes: order, bounded look-ahead, and a killed worker."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dwt_ds.prepare import workers as workers_module
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


def test_an_interruption_does_not_wait_for_the_workers() -> None:
    def items() -> Iterator[float]:
        yield 60.0
        raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(ordered_map(time.sleep, items(), 2))
    assert time.monotonic() - begun < 30


def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(ChildProcessError, match="a worker process was killed .*fewer than 2 workers"):
        list(ordered_map(os._exit, [9], 2))


def test_workers_that_cannot_be_started_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /dev/shm is full. It is not the disk of --out, which prepare would name."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(workers_module, "ProcessPoolExecutor", fail)
    with pytest.raises(ChildProcessError, match="^--workers 2: .*make room in /dev/shm, or give --workers 1") as caught:
        list(ordered_map(abs, [1], 2))
    assert caught.value.errno is None


def test_a_script_is_not_run_again_by_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from dwt_ds.prepare.workers import ordered_map\nprint('once', list(ordered_map(abs, [-1, -2], 2)))\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("once [1, 2]\n", "")
