"""Exit codes of a watched launcher, and which of its processes are waited for."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.mounts import mounted

from dwt_ds.launch import supervise
from dwt_ds.launch.hostfile import Host
from dwt_ds.launch.local import Launch
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.stop import STOP_FILE, StopRequest


def shell(script: str, hosts: int = 1, launcher: str = "none") -> Launch:
    """A launch whose launcher is this script; its last word is `--launched_as=NAME`."""
    named = [Host(f"node-{number}", 1) for number in range(1, hosts + 1)]
    return Launch(named, "127.0.0.1", launcher, [], dict(os.environ), prefix=["sh", "-c", script])


@pytest.mark.parametrize(
    ("before", "during", "launchers_code", "code"),
    [
        ("", "complete", 0, 0),
        ("", "complete", 1, 0),
        ("complete", "", 0, 0),  # a finished run was started again
        ("", "", 0, supervise.STOPPED),
        ("", "", 7, 7),
        ("complete", "", 2, 2),  # of an earlier start
    ],
)
def test_the_exit_code_is_the_runs_and_not_the_launchers_word(
    before: str, during: str, launchers_code: int, code: int, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    mark = folder.path / "complete.json"
    folder.finish(4)
    mark.replace(tmp_path / "mark")
    if before:
        mark.write_bytes((tmp_path / "mark").read_bytes())
        os.utime(mark, (1e9, 1e9))
    finish = f"cp {tmp_path / 'mark'} {mark}; " if during else ""
    assert supervise.watch(shell(f"{finish}exit {launchers_code}"), [], folder) == code


def test_a_killed_launcher_is_a_run_that_stopped(tmp_path: Path) -> None:
    assert supervise.watch(shell("kill -9 $$"), [], RunFolder(tmp_path)) == supervise.STOPPED


def test_a_signal_becomes_a_request_in_the_runs_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    asks = f"kill -TERM {os.getpid()}; until [ -e {folder.path / STOP_FILE} ]; do sleep 0.05; done; exit 3"
    assert supervise.watch(shell(asks), [], folder) == 3
    assert not (folder.path / STOP_FILE).exists()


def test_a_signal_reaches_the_ranks_of_a_run_on_a_full_disk(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with mounted(folder.path, "size=4k"):
        (folder.path / "full").write_bytes(b"1" * 4096)
        asks = f"kill -INT {os.getpid()}; until [ -e {folder.path / STOP_FILE} ]; do sleep 0.05; done; exit 3"
        assert supervise.watch(shell(asks), [], folder) == 3


def test_of_two_launches_in_a_folder_a_signal_stops_its_own(tmp_path: Path) -> None:
    """Both started at once, neither has written there yet."""
    folder, stop = RunFolder(tmp_path / "run"), tmp_path / "run" / STOP_FILE
    # Its rank tells that it saw the request; the other launch's saw the same file.
    rank = (
        "import sys, time; from pathlib import Path; from dwt_ds.run.stop import StopRequest\n"
        "mine, other = StopRequest(sys.argv[-1].removeprefix('--launched_as=')), StopRequest('another')\n"
        f"while not mine.is_asked(Path({str(folder.path)!r})): time.sleep(0.05)\n"
        f"sys.exit(4 if other.is_asked(Path({str(folder.path)!r})) else 3)"
    )
    script = f'{shlex.quote(sys.executable)} -c {shlex.quote(rank)} "$@" & kill -INT {os.getpid()}; wait $!'
    assert supervise.watch(shell(script), [], folder) == 3
    assert not stop.exists()
    stop.write_text("another")
    assert supervise.watch(shell("exit 5"), [], folder) == 5
    assert stop.read_text() == "another", "a request of the other launch is left to it"


def test_a_request_that_names_nobody_is_for_all(tmp_path: Path) -> None:
    one, other = StopRequest("one"), StopRequest()
    assert not one.is_asked(tmp_path)
    (tmp_path / STOP_FILE).touch()
    os.utime(tmp_path / STOP_FILE, (time.time() + 1, time.time() + 1))  # the kernel's clock for files may lag a little
    assert one.is_asked(tmp_path)
    assert other.is_asked(tmp_path)


# Stands for pdsh with two hosts. One ends at once; the other when it is asked to.
PDSH = """#!/bin/sh
cd {folder}
./ssh 0.1 &
./ssh 600 &
until [ -e {stop} ]; do sleep 0.05; done
kill $!
exit {code}
"""


@pytest.mark.parametrize(("launchers_code", "code"), [(255, 255), (0, 1)])
def test_a_host_lost_before_the_ranks_met_ends_the_launch(
    launchers_code: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    launch = pdsh_stand_in(tmp_path, PDSH.format(folder=tmp_path, stop=folder.path / STOP_FILE, code=launchers_code))
    monkeypatch.setattr(supervise, "_HOST_SECONDS", 1.0)
    assert supervise.watch(launch, [], folder) == code
    assert "error: 1 of 2 hosts ended before all ranks had met" in capfd.readouterr().err


def test_a_host_that_ends_after_the_ranks_met_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    rank_0 = (
        "import sys, time; from pathlib import Path; from dwt_ds.base.locks import FolderLock\n"
        "with FolderLock(Path(sys.argv[1]), 'output_dir'): time.sleep(3)"
    )
    rank_0 = shlex.join([sys.executable, "-c", rank_0, str(folder.path)])
    script = f"#!/bin/sh\ncd {tmp_path}\n./ssh 0.1 &\n./ssh 600 &\n{rank_0}\nkill $!\nexit 0\n"
    monkeypatch.setattr(supervise, "_HOST_SECONDS", 1.0)
    assert supervise.watch(pdsh_stand_in(tmp_path, script), [], folder) == supervise.STOPPED
    assert "hosts ended" not in capfd.readouterr().err


def pdsh_stand_in(folder: Path, script: str) -> Launch:
    """A launch on two hosts with this script for pdsh; its connections are `ssh SECONDS`."""
    (folder / "pdsh").write_text(script, encoding="utf-8")
    (folder / "pdsh").chmod(0o755)
    shutil.copy("/bin/sleep", folder / "ssh")
    return shell(f"{shlex.quote(str(folder / 'pdsh'))}; exit $?", hosts=2, launcher="pdsh")


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    former = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, former):
        signal.signal(number, handler)


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
from dwt_ds.launch import supervise
from dwt_ds.launch.hostfile import Host
from dwt_ds.launch.local import Launch
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
