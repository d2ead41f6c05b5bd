from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from dwt_ds.doctor.probe import _build_operators
from dwt_ds.engine.extension_locks import extensions_folder, find_locks


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    # Where the tests themselves run in a container.
    monkeypatch.setattr("dwt_ds.engine.extension_locks._FIRST_PID_NAMESPACE", os.stat("/proc/self/ns/pid").st_ino)
    return tmp_path


def test_the_folder_is_the_one_that_torch_builds_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in (None, str(tmp_path / "chosen")):
        monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
        if chosen:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", chosen)
        else:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        assert extensions_folder() == Path(cpp_extension._get_build_directory("cpu_adam", verbose=False)).parent


def test_without_a_build_there_is_no_lock(extensions: Path) -> None:
    assert find_locks() == []


def test_a_lock_that_a_build_holds_is_not_stale(extensions: Path) -> None:
    baton = FileBaton(str(extensions / "cpu_adam" / "lock"))
    assert baton.try_acquire()
    (lock,) = find_locks()
    assert (lock.operator, lock.held) == ("cpu_adam", True)
    assert not lock.stale(several_hosts=False)
    baton.release()
    assert find_locks() == []


def test_the_lock_of_a_killed_build_is_stale(extensions: Path) -> None:
    path = extensions / "cpu_adam" / "lock"
    path.touch()
    (lock,) = find_locks()
    assert (lock.path, lock.held) == (str(path), False)
    assert lock.stale(several_hosts=False)
    # Another host's process may hold it; an old one nobody does.
    assert not lock.stale(several_hosts=True)
    os.utime(path, (1e9, 1e9))
    assert find_locks()[0].stale(several_hosts=True)


def test_an_operator_with_a_stale_lock_is_not_waited_for(extensions: Path) -> None:
    answers = _build_operators(skip=["cpu_adam", "fused_adam"])
    assert [(answer["name"], answer["problem"]) for answer in answers] == [
        ("cpu_adam", "not tried: a lock stands"),
        ("fused_adam", "not tried: a lock stands"),
    ]


@pytest.mark.parametrize("hidden", ["host", "container", "user"])
def test_a_lock_whose_holder_cannot_be_seen_is_stale_by_age_alone(
    hidden: str, extensions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build on another host with the same home folder, in another container, or of another user."""
    path, written = extensions / "cpu_adam" / "lock", extensions / "cpu_adam" / "cpu_adam.o"
    path.touch()
    written.touch()
    assert find_locks()[0].stale(several_hosts=False)
    if hidden == "host":
        disks = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint="/tmp", fstype="nfs4")]
        disks.append(SimpleNamespace(mountpoint=str(extensions), fstype="nfs4"))
        monkeypatch.setattr("psutil.disk_partitions", lambda all: disks)
    elif hidden == "container":
        monkeypatch.setattr("dwt_ds.engine.extension_locks._FIRST_PID_NAMESPACE", 1)
        disk = SimpleNamespace(mountpoint=str(extensions), fstype="ext4")
        monkeypatch.setattr("psutil.disk_partitions", lambda all: [disk])
    else:
        monkeypatch.setattr("os.geteuid", lambda: path.stat().st_uid + 1)
    (lock,) = find_locks()
    assert not lock.held
    assert not lock.stale(several_hosts=False)
    # A long build's lock is old, what it writes is not.
    os.utime(path, (1e9, 1e9))
    assert not find_locks()[0].stale(several_hosts=False)
    os.utime(written, (1e9, 1e9))
    assert find_locks()[0].stale(several_hosts=False)
