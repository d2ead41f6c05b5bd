"""The work folder is removed only when no file in it is open: NFS would keep the lock's file, and the folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dwt_ds.base.files import MANIFEST
from dwt_ds.data.manifest import UNFINISHED_NAME
from dwt_ds.prepare import output
from dwt_ds.prepare.output import work_folder
from dwt_ds.prepare.rows import part_path


@pytest.fixture(autouse=True)
def nfs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were removed; one with an open file is not."""
    removed: list[Path] = []
    plain = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        if any(Path(name).is_relative_to(path) for name in opened):
            raise OSError(39, "Directory not empty", str(path))
        plain(path, **options)
        removed.append(path)

    monkeypatch.setattr(output.shutil, "rmtree", rmtree)
    return removed


def test_a_finished_preparation_leaves_no_work_folder(tmp_path: Path, nfs: list[Path]) -> None:
    out = tmp_path / "out"
    with work_folder(out, {"a": 1}) as work:
        (work / "part").write_text("")
        (out / MANIFEST).write_text("{}")
    assert nfs == [work]
    assert [path.name for path in out.iterdir()] == [MANIFEST]


def test_a_mistake_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text"), work_folder(tmp_path / "out", {"a": 1}):
        raise ValueError("no text")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_an_interruption_leaves_the_work_folder(error: BaseException, tmp_path: Path, nfs: list[Path]) -> None:
    with pytest.raises(type(error)), work_folder(tmp_path / "out", {"a": 1}) as work:
        raise error
    with pytest.raises(ValueError, match="other settings"), work_folder(tmp_path / "out", {"a": 2}):
        pass
    assert work.is_dir()
    assert not nfs


def test_the_folder_of_another_process_at_work_stays(tmp_path: Path, nfs: list[Path]) -> None:
    with work_folder(tmp_path / "out", {"a": 1}) as work:
        with pytest.raises(ValueError, match="writes there already"), work_folder(tmp_path / "out", {"a": 1}):
            pass
        assert work.is_dir()
    assert not nfs


def test_finished_parts_outlive_a_mistake(tmp_path: Path, nfs: list[Path]) -> None:
    """As where much is unknown to the tokenizer: with --allow-unknown the same command goes on from the parts."""
    part = part_path(tmp_path / "out" / UNFINISHED_NAME, 0)
    part.parent.mkdir(parents=True)
    part.touch()
    with pytest.raises(ValueError, match="unknown"), work_folder(tmp_path / "out", {"a": 1}):
        raise ValueError("unknown")
    assert part.is_file()
    assert not nfs


def test_a_folder_that_another_process_has_just_finished_stays(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", {"a": 1}):
        (tmp_path / "out" / MANIFEST).write_text("{}")
    (tmp_path / "out" / UNFINISHED_NAME).mkdir()  # as it was when the second process looked
    with pytest.raises(ValueError, match="has just finished it; repeat"), work_folder(tmp_path / "out", {"a": 1}):
        pass
