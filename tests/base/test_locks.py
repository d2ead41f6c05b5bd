"""One writer a folder, with real processes, forks and kills."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness.writers import Hold

from dwt_ds.base import locks
from dwt_ds.base.locks import LOCK_NAME, FolderLock, OccupiedError, release_locks
from dwt_ds.base.software import host_name

# Whoever has the lock makes a file that nobody else may find.
TAKE_TURNS = """
import os, sys, time
from pathlib import Path
from dwt_ds.base import locks
folder, had = Path(sys.argv[1]), 0
give_up = time.monotonic() + 20
while had < 40 and time.monotonic() < give_up:
    try:
        with locks.FolderLock(folder, "--out x"):
            descriptor = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)
            os.unlink(folder / "inside")
            os.close(descriptor)
            had += 1
    except locks.OccupiedError:
        pass
print(had)
"""


def test_a_second_writer_waits_and_is_refused_with_the_name_of_the_first(
    tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 0.3)
    owner = hold(tmp_path)
    began = time.monotonic()
    with pytest.raises(OccupiedError) as caught:
        FolderLock(tmp_path, "--out x")
    assert time.monotonic() - began > 0.3
    message = str(caught.value)
    since = time.strftime("%Y-%m-%d", time.gmtime())
    assert message.startswith(f"--out x: process {owner} on host {host_name()} has been writing there since {since} ")
    assert "\n" not in message


@pytest.mark.parametrize("then", ["", "os.fork() and None", "subprocess.Popen(['sleep', '600'], close_fds=False)"])
def test_the_lock_dies_with_its_owner_whatever_its_children_do(then: str, tmp_path: Path, hold: Hold) -> None:
    """A child made by fork has every open file of the owner, one made by exec only those that it is handed."""
    then = then.replace("os.fork() and None", "os.fork() or time.sleep(600)")
    os.kill(hold(tmp_path, then=then), signal.SIGKILL)
    with FolderLock(tmp_path, "--out x"):
        pass


def test_a_rank_whose_launcher_was_killed_is_waited_for(tmp_path: Path, hold: Hold) -> None:
    """It saves and ends by itself: here after a second."""
    watch = "import threading; parent = os.getppid()\ndef end():\n    while os.getppid() == parent: time.sleep(0.05)\n"
    watch += "    time.sleep(1)\n    os._exit(0)\nthreading.Thread(target=end).start()"
    owner = hold(tmp_path, then=watch, under_a_launcher=True)
    launcher = int(Path(f"/proc/{owner}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(launcher, signal.SIGKILL)
    with FolderLock(tmp_path, "--out x"):
        pass


def test_an_owner_that_lost_the_lock_is_told_and_only_then(tmp_path: Path, hold: Hold) -> None:
    with FolderLock(tmp_path, "--out x") as lock:
        lock.require("--out x")
        # What a file server does once it has not heard from the owner's host for long: the kernel drops the lock when
        # any handle of the file is closed.
        os.close(os.open(tmp_path / LOCK_NAME, os.O_RDONLY))
        lock.require("--out x")  # nobody else came: it is taken again
        os.close(os.open(tmp_path / LOCK_NAME, os.O_RDONLY))
        hold(tmp_path)
        with pytest.raises(OccupiedError, match="--out x: .* another process took over this folder .* this one ends"):
            lock.require("--out x")


def test_the_owners_name_is_on_disk_with_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS it would come to the other hosts late, and never from a host that was lost."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.pread(descriptor, 1000, 0)))
    with FolderLock(tmp_path, "--out x"):
        assert [f'"process": {os.getpid()}' in text.decode() for text in synced] == [True]


def test_a_lock_that_ends_well_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with FolderLock(tmp_path / "kept", "--out x"):
        pass
    assert list((tmp_path / "kept").iterdir()) == []
    with FolderLock(tmp_path / "used", "--out x"):
        (tmp_path / "used" / "file").touch()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["file"]
    FolderLock(tmp_path / "held", "--out x")
    release_locks()
    assert not (tmp_path / "held").exists()


def test_a_process_is_not_let_in_twice(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with (
        FolderLock(tmp_path / "folder", "--out x"),
        pytest.raises(OccupiedError, match=f"this process, {os.getpid()}, writes"),
    ):
        FolderLock(tmp_path / "link", "--out x")
    with FolderLock(tmp_path / "link", "--out x"):
        assert (tmp_path / "folder" / LOCK_NAME).is_file()


def test_of_many_processes_one_at_a_time_is_inside(tmp_path: Path) -> None:
    words = [sys.executable, "-c", TAKE_TURNS, str(tmp_path / "folder")]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ended = [process.communicate() for process in processes]
    assert [error for _, error in ended] == [""] * 3
    assert [int(turns) for turns, _ in ended] == [40] * 3


def test_a_folder_that_its_former_owner_removes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real, removed = tmp_path / "folder", os.open, []

    def open_late(path: Any, *arguments: Any) -> int:
        if Path(path).name == LOCK_NAME and not removed:
            removed.append(folder.rmdir())
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", open_late)
    with FolderLock(folder, "--out x"):
        assert removed
        assert (folder / LOCK_NAME).is_file()


def test_empty_folders_that_were_made_for_it_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with FolderLock(tmp_path / "mine" / "b" / "c", "--out x"):
        assert (tmp_path / "mine" / "b" / "c" / LOCK_NAME).is_file()
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]
    with FolderLock(tmp_path / "mine" / "b" / "c", "--out x"):
        (tmp_path / "mine" / "b" / "kept").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "kept", "mine"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with FolderLock(tmp_path, "--out x"):
        pass
    assert capsys.readouterr().err.startswith("warning: --out x: this file system has no locks (")


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        FolderLock(tmp_path / "file" / "below", "--out x")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_of_another_user_is_named_with_its_option(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    told = rf"^--out x: this user cannot write there \({os.strerror(number)}: {tmp_path}/\.writer\); name another"
    with pytest.raises(OSError, match=told):
        FolderLock(tmp_path, "--out x")
