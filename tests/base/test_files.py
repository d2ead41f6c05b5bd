"""Files that appear complete or not at all, and manifests that find what has changed."""

from __future__ import annotations

import errno
import glob
import os
import stat
from pathlib import Path

import pytest
from harness.errors import error_of

from dwt_ds.base import files
from dwt_ds.base.files import (
    check_replaceable,
    escape_existing,
    file_facts,
    find_file,
    plain_name,
    problems,
    read_json,
    read_manifest,
    replace_folder,
    unfinished_folder,
    write_json,
    write_manifest,
)


def test_a_file_keeps_its_former_contents_if_writing_fails(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"[1]", b"{", b"null", b"", b"\xff"])
def test_a_json_file_without_an_object_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert error_of(read_json, path).startswith(f"{path}: ")


@pytest.mark.parametrize("content", [b"{", b"null", b"\xff"])
def test_a_damaged_manifest_is_named_within_its_folder(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    (problem,) = problems(tmp_path)
    assert problem.startswith("manifest.json: ")
    assert str(tmp_path) not in problem


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new"]


def test_a_manifest_finds_what_has_changed(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(f"contents of {name}")
    assert problems(tmp_path) == ["manifest.json: missing"]
    write_manifest(tmp_path, {"files": file_facts(tmp_path, ["a", "b", "c"])})
    assert problems(tmp_path) == []
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("shorter")
    (tmp_path / "c").write_text("contents of x")
    assert problems(tmp_path) == [
        "a: missing",
        "b: 7 bytes, the manifest says 13",
        "c: the contents have changed (sha256 differs)",
    ]
    (tmp_path / "manifest.json").write_text("{}")
    assert problems(tmp_path) == ["manifest.json: lists no files"]
    (tmp_path / "manifest.json").write_text("{")
    assert problems(tmp_path)[0].startswith("manifest.json: ")


def test_a_file_that_a_bad_disk_does_not_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(digest: object, path: Path) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "weights").write_bytes(b"1")
    write_manifest(tmp_path, {"files": file_facts(tmp_path, ["weights"])})
    monkeypatch.setattr(files, "add_to_digest", fail)
    number = errno.EIO
    assert problems(tmp_path) == ["weights: cannot be read (Input/output error)"]
    number = errno.ESTALE  # of a file server, which may have it again
    with pytest.raises(OSError, match="Stale"):
        problems(tmp_path)


def test_a_manifest_of_another_user_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would begin anew in its own folder."""

    def refuse(path: Path, **_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    write_manifest(tmp_path, {"files": {}})
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(PermissionError, match="manifest.json"):
        problems(tmp_path)


def test_no_changed_byte_of_a_manifest_changes_what_is_read(tmp_path: Path) -> None:
    """A step number with another digit is still JSON."""
    content = {"state": {"step": 6, "adaptive": {"hard": 3.25}}, "files": {}}
    write_manifest(tmp_path, content)
    assert read_manifest(tmp_path) == content
    path = tmp_path / "manifest.json"
    written = path.read_bytes()
    for place in range(len(written)):
        changed = bytearray(written)
        changed[place] ^= 1
        path.write_bytes(changed)
        # Without the key of its sum it is taken for that of an earlier version.
        assert problems(tmp_path) or read_manifest(tmp_path).items() >= content.items(), bytes(changed)


@pytest.mark.parametrize("there", [True, False])
def test_what_is_written_goes_through_a_link(there: bool, tmp_path: Path) -> None:
    """The link stays, also where what it names does not exist yet."""
    (tmp_path / "elsewhere").mkdir()
    if there:
        write_json(tmp_path / "elsewhere" / "a.json", {"a": 1})
        (tmp_path / "elsewhere" / "export").mkdir()
        (tmp_path / "elsewhere" / "export" / "old").touch()
    for name in ("a.json", "export"):
        (tmp_path / name).symlink_to(Path("elsewhere", name))
    write_json(tmp_path / "a.json", {"a": 2})
    assert read_json(tmp_path / "elsewhere" / "a.json") == {"a": 2}
    for name in ("first", "second"):
        finished = unfinished_folder(tmp_path / "export")
        finished.mkdir()
        (finished / name).touch()
        replace_folder(finished, tmp_path / "export")
    assert os.readlink(tmp_path / "export") == "elsewhere/export"
    assert os.readlink(tmp_path / "a.json") == "elsewhere/a.json"
    assert [path.name for path in (tmp_path / "elsewhere" / "export").iterdir()] == ["second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "elsewhere", "export"]
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["a.json", "export"]


def test_a_link_that_cannot_be_written_through_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "to file").symlink_to("file")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "to mount").symlink_to("/dev/shm")
    with pytest.raises(ValueError, match="is a link to .*file, which is not a folder"):
        check_replaceable(tmp_path / "to file")
    with pytest.raises(OSError, match="lead in a circle"):
        check_replaceable(tmp_path / "circle")
    with pytest.raises(ValueError, match="is a link to /dev/shm, which cannot be replaced by a new folder"):
        check_replaceable(tmp_path / "to mount")
    check_replaceable(tmp_path / "not there")


def test_a_folder_that_cannot_take_its_place_leaves_the_former_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").touch()
    (tmp_path / "new").mkdir()
    (tmp_path / "there.old").mkdir()  # somebody's own
    with pytest.raises(OSError, match="."):
        replace_folder(_Stubborn(tmp_path / "new"), tmp_path / "there")
    assert (tmp_path / "there" / "old").is_file()
    replace_folder(tmp_path / "new", tmp_path / "there")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["there", "there.old"]


class _Stubborn(type(Path())):  # type: ignore[misc]
    def rename(self, target: object) -> None:
        raise OSError("no")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_a_finished_folder_have_the_modes_that_the_umask_asks_for(
    umask: int, mode: int, tmp_path: Path
) -> None:
    former = os.umask(umask)
    try:
        (tmp_path / "new" / "below").mkdir(parents=True)
        for name in ("a", "below/b"):
            (tmp_path / "new" / name).touch()
            (tmp_path / "new" / name).chmod(0o600)
        replace_folder(tmp_path / "new", tmp_path / "folder")
    finally:
        os.umask(former)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {"a": mode, "b": mode}


def test_a_file_below_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.json").touch()
    assert find_file("~/my.json", {}, "deepspeed_config") == tmp_path / "my.json"


def test_a_plain_name_is_no_pattern(tmp_path: Path) -> None:
    for name in ("b[12]", "b1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.pt").touch()
    assert glob.glob(f"{tmp_path}/b[12]/*.pt") == [f"{tmp_path}/b1/b1.pt"]
    with plain_name(tmp_path / "b[12]") as folder:
        assert [Path(found).name for found in glob.glob(f"{folder}/*.pt")] == ["b[12].pt"]
        (Path(folder) / "made").touch()
    assert (tmp_path / "b[12]" / "made").is_file()
    assert not Path(folder).exists()


def test_only_what_does_not_exist_is_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b[12]", "b1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").touch()
    assert glob.glob(escape_existing(f"{tmp_path}/b[12]/*.txt")) == [f"{tmp_path}/b[12]/a.txt"]
    assert glob.glob(escape_existing(f"{tmp_path}/b[1]/*.txt")) == [f"{tmp_path}/b1/a.txt"]
    monkeypatch.chdir(tmp_path)
    assert glob.glob(escape_existing("b[12]/a*")) == ["b[12]/a.txt"]
    assert glob.glob(escape_existing("b[!x]/a*")) == ["b1/a.txt"]
    assert sorted(glob.glob(escape_existing("**/*.txt"), recursive=True)) == ["b1/a.txt", "b[12]/a.txt"]
