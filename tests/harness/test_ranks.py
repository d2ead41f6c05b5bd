"""The ranks' server: what a rank that it forks has in common with one that was started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from harness.ranks import OUTLIVED, Start

SHOW = "import os, sys; print(__name__, sys.argv[1:], os.environ['RANK'], os.environ.get('A'), 'torch' in sys.modules)"


def test_each_rank_has_its_words_and_variables(start_ranks: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "both")
    words = [["-c", SHOW, "b"], ["-c", SHOW, "c d"]]
    first, second = start_ranks(words, own=[{}, {"A": "own"}]).wait(60)
    assert first == (0, "__main__ ['b'] 0 both True\n", "")
    assert second == (0, "__main__ ['c d'] 1 own True\n", "")


def test_a_module_and_a_file_are_run_as_python_runs_them(start_ranks: Start, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("number = 3\n")
    (tmp_path / "program.py").write_text("import sys, beside; sys.exit(beside.number)\n")
    module, program = start_ranks([["-m", "this"], [str(tmp_path / "program.py")]]).wait(60)
    assert "Zen of Python" in module.out
    assert program.code == 3


def test_processes_of_a_rank_are_started_as_everywhere(start_ranks: Start) -> None:
    code = "import multiprocessing as m; print(m.get_start_method())"
    [rank] = start_ranks([["-c", code]]).wait(60)
    assert rank.out == f"{multiprocessing.get_all_start_methods()[0]}\n"


def test_codes_are_those_of_processes(start_ranks: Start) -> None:
    endings = ["import os; os._exit(7)", "raise ValueError('a')", "import os, signal; os.kill(os.getpid(), 9)"]
    ended = [start_ranks([["-c", code]]).wait(60)[0] for code in endings]
    assert [rank.code for rank in ended] == [7, 1, -signal.SIGKILL]
    assert "ValueError: a" in ended[1].err


def test_a_rank_that_waits_for_a_failed_one_is_ended(start_ranks: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.ranks.OTHERS_SECONDS", 0.2)
    ranks = start_ranks([["-c", "import time; time.sleep(600)"], ["-c", "import sys; sys.exit(2)"]])
    assert [rank.code for rank in ranks.wait(60)] == [-signal.SIGKILL, 2]
    assert ranks.output() == f"{OUTLIVED} 0\n"


def test_ranks_that_hang_fail_the_test_with_their_output(start_ranks: Start) -> None:
    with pytest.raises(pytest.fail.Exception, match="still running after 1 s\nhere"):
        start_ranks([["-c", "import time; print('here'); time.sleep(600)"]]).wait(1)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_server_has_no_threads_that_a_fork_would_lack(start_ranks: Start) -> None:
    ranks = start_ranks([["-c", "import time; time.sleep(600)"]])
    server = psutil.Process(ranks.processes[0].pid).parent()
    assert server is not None
    names = [Path(f"/proc/{server.pid}/task/{thread.id}/comm").read_text() for thread in server.threads()]
    # Arrow's allocator starts its own again after a fork.
    assert len([name for name in names if name != "jemalloc_bg_thd\n"]) == 1
    assert server.pid != os.getpid()
