"""Files that appear complete or not at all, and manifests that find what has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwt_ds.base.files import file_facts, problems, read_json, replace_folder, write_json, write_manifest


def test_a_file_keeps_its_former_contents_if_writing_fails(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", ["[1]", "{", "null", ""])
def test_a_json_file_without_an_object_is_a_value_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="."):
        read_json(tmp_path / "a.json")


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
