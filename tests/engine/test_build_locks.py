"""Locks of compiled operators: a live one is waited for, one of a killed process is passed over or named."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from harness.ranks import Python, Run, Start
from harness.waiting import wait_until
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from dwt_ds.engine import build_locks
from dwt_ds.engine.build_locks import (
    TORCHS_LOCKS_END,
    extensions_folder,
    find_abandoned_locks,
    replace_torchs_build_locks,
)

# For the tests of what replaces the locks of earlier versions.
BEFORE_2_14 = pytest.mark.skipif(TORCHS_LOCKS_END, reason="this torch's own locks end with their process")


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of this moment, with torch's wait patched as a run patches it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("wait", "try_acquire"):
        monkeypatch.setattr(FileBaton, name, getattr(FileBaton, name))  # put back afterwards
    monkeypatch.setattr(build_locks, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(build_locks, "_MESSAGE_SECONDS", 0.05)
    replace_torchs_build_locks()
    (tmp_path / "cpu_adam").mkdir()
    path = tmp_path / "cpu_adam" / "lock"
    assert FileBaton(str(path)).try_acquire()
    return path


def minutes_ago(path: Path, minutes: float) -> None:
    then = time.time() - 60 * minutes
    os.utime(path, (then, then))


def finish(lock: Path) -> None:
    """As a build ends."""
    (lock.parent / "cpu_adam.so").touch()
    lock.unlink()


def test_the_folder_is_the_one_that_torch_builds_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in (None, str(tmp_path / "chosen")):
        monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
        if chosen:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", chosen)
        else:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        assert extensions_folder() == Path(cpp_extension._get_build_directory("cpu_adam", verbose=False)).parent


@BEFORE_2_14
def test_a_live_build_is_waited_for_with_a_message(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    minutes_ago(lock, 9)
    release = threading.Timer(0.3, finish, [lock])
    release.start()
    FileBaton(str(lock)).wait()
    release.join()
    assert f"if none does, delete {lock}" in capsys.readouterr().err


@BEFORE_2_14
def test_a_build_that_ends_without_the_operator_is_named(lock: Path) -> None:
    """Its process was stopped by Ctrl-C, or its compiler failed."""
    release = threading.Timer(0.1, lock.unlink)
    release.start()
    said = "the process that compiled cpu_adam was stopped or failed .*; start again"
    with pytest.raises(ValueError, match=f"^{lock.parent}: {said}$"):
        FileBaton(str(lock)).wait()
    release.join()


@BEFORE_2_14
def test_a_build_that_still_writes_is_never_abandoned(lock: Path) -> None:
    """It may be an hour old, on another host with the same home folder, or in another container."""
    minutes_ago(lock, 60)
    (lock.parent / "cpu_adam.o").touch()
    assert find_abandoned_locks() == []


@BEFORE_2_14
def test_an_abandoned_lock_is_named_with_what_to_do(lock: Path) -> None:
    minutes_ago(lock, 11)
    assert find_abandoned_locks() == [lock]
    with pytest.raises(ValueError, match=rf"^{lock}: left by a build that was killed.*delete that file$"):
        FileBaton(str(lock)).wait()
    finish(lock)
    FileBaton(str(lock)).wait()
    assert find_abandoned_locks() == []


# Takes the lock as a start does that loads an operator, and holds it until it is killed, or lets it go after a while
# with the operator built.
HOLD = """
import pathlib, sys, time
from torch.utils.file_baton import FileBaton
from dwt_ds.engine.build_locks import replace_torchs_build_locks
replace_torchs_build_locks()
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
held = pathlib.Path(sys.argv[2])
held.touch()
time.sleep(float(sys.argv[3]))
held.unlink()
pathlib.Path(sys.argv[1]).with_name("shm_comm.so").touch()
baton.release()
"""
WAIT = """
import os, sys
from torch.utils.file_baton import FileBaton
from dwt_ds.engine.build_locks import replace_torchs_build_locks
replace_torchs_build_locks()
FileBaton(sys.argv[1]).wait()
print("held" if os.path.exists(sys.argv[2]) else "through")
"""


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a compiled operator lies."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "shm_comm"
    folder.mkdir()
    (folder / "shm_comm.so").touch()
    return folder


def kill_holder(start_ranks: Start, folder: Path) -> None:
    """A process takes the lock in `folder` and is killed with SIGKILL."""
    holder = start_ranks([["-c", HOLD, str(folder / "lock"), str(folder.parent / "held"), "600"]])
    wait_until((folder.parent / "held").exists, holder)
    holder.kill()
    assert (folder / "lock").exists()


@BEFORE_2_14
def test_the_lock_of_a_process_killed_while_it_loads_is_passed_over(
    operator: Path, start_ranks: Start, run_ranks: Run
) -> None:
    kill_holder(start_ranks, operator)
    ended = run_ranks([["-c", WAIT, str(operator / "lock"), ""]] * 2)
    assert [rank.out for rank in ended] == ["through\n"] * 2
    assert not (operator / "lock").exists()


@BEFORE_2_14
def test_the_lock_of_a_process_that_lives_is_waited_for(operator: Path, start_ranks: Start, python: Python) -> None:
    held = operator.parent / "held"
    holder = start_ranks([["-c", HOLD, str(operator / "lock"), str(held), "8"]])
    wait_until(held.exists, holder)
    # A build that takes long for one file, too.
    (operator / "shm_comm.so").unlink()
    minutes_ago(operator / "lock", 60)
    assert find_abandoned_locks() == []
    assert python("-c", WAIT, str(operator / "lock"), str(held)).out == "through\n"


@BEFORE_2_14
def test_only_locks_that_stop_a_run_are_found(operator: Path, start_ranks: Start) -> None:
    kill_holder(start_ranks, operator)
    for path in operator.iterdir():
        minutes_ago(path, 11)
    assert find_abandoned_locks() == []
    (operator / "shm_comm.so").unlink()
    assert find_abandoned_locks() == [operator / "lock"], "a build that was killed"
    (operator / "lock").write_bytes(b"")
    minutes_ago(operator / "lock", 11)
    assert find_abandoned_locks() == [operator / "lock"], "one of torch's own locks, too"
    (operator / "shm_comm.so").touch()
    minutes_ago(operator / "shm_comm.so", 11)
    assert find_abandoned_locks() == [], "one that torch 2.14 leaves behind"
    build_locks._wait(FileBaton(str(operator / "lock")))
    assert not (operator / "lock").exists()


def test_no_lock_is_abandoned_where_torchs_own_end(operator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_locks, "TORCHS_LOCKS_END", True)
    (operator / "shm_comm.so").unlink()
    (operator / "lock").touch()
    minutes_ago(operator / "lock", 60)
    assert find_abandoned_locks() == []
    torchs = FileBaton.wait, FileBaton.try_acquire
    replace_torchs_build_locks()
    assert (FileBaton.wait, FileBaton.try_acquire) == torchs


def test_a_lock_that_has_just_gone_is_not_abandoned(operator: Path) -> None:
    minutes_ago(operator / "shm_comm.so", 60)
    assert not build_locks._abandoned(operator / "lock")
