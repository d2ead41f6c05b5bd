"""Worker processes end with a killed parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from harness.waiting import wait_until

# Each yields the process of a worker, after which the workers wait for more.
PREPARE = "ordered_map(process, range(1000), 2)"
FINE_TUNING = "(process for _, process in spread(process, [(n,) for n in range(4)], ['', '']))"
WORK = """
    import os

    def process(_):
        return os.getpid()
"""
PARENT = """
    import time
    from work import process
    from dwt_ds.glue.devices import spread
    from dwt_ds.prepare.workers import ordered_map

    if __name__ == "__main__":
        for number in WORK:
            print(number, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize(
    "work", [PREPARE, pytest.param(FINE_TUNING, marks=pytest.mark.slow)], ids=["prepare", "fine-tuning"]
)
def test_workers_end_with_a_killed_parent(work: str, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(textwrap.dedent(WORK))
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT).replace("WORK", work))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = {int(parent.stdout.readline()) for _ in range(3)}
        assert parent.pid not in workers
        assert all(is_running(worker) for worker in workers)
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(is_running(worker) for worker in workers))


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
