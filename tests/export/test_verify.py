"""`dwt-ds verify` finds every kind of damage, in every kind of folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dwt_ds.base.files import file_facts, write_manifest
from dwt_ds.cli.main import main
from dwt_ds.export.verify import verify


def folder_with_manifest(folder: Path, name: str = "config.json") -> Path:
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"0123456789")
    (folder / name).write_text("{}")
    write_manifest(folder, {"files": file_facts(folder, ["weights.bin", name])})
    return folder


def test_a_run_is_verified_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = tmp_path / "checkpoints"
    folder_with_manifest(checkpoints / "step_00000002", "generators_00000.pt")
    damaged = folder_with_manifest(checkpoints / "step_00000004", "generators_00000.pt")
    folder_with_manifest(tmp_path / "export")
    assert main(["verify", str(tmp_path)]) == 0
    (damaged / "weights.bin").unlink()
    (checkpoints / "step_00000006.tmp").mkdir()
    assert main(["verify", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "weights.bin: missing" in output
    assert [finding.kind for finding in verify(tmp_path)] == ["checkpoint", "checkpoint", "unfinished", "export"]


def test_a_data_set_is_verified(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    [finding] = verify(folder)
    assert (finding.kind, finding.problems) == ("data set", [])
    shard = next(folder.rglob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert verify(folder)[0].problems == [f"{shard.relative_to(folder)}: the contents have changed (sha256 differs)"]
    shard.unlink()
    assert verify(folder)[0].problems == [f"{shard.relative_to(folder)}: missing"]


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", "{}", '{"files": {"weights.bin": 10}}', '{"shards": 3}'])
def test_a_folder_is_named_as_what_it_is_whatever_its_manifest(
    tiny_data: Path, tmp_path: Path, manifest: str | None
) -> None:
    run = tmp_path / "run"
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    checkpoint = folder_with_manifest(run / "checkpoints" / "step_00000002", "generators_00000.pt")
    export = folder_with_manifest(run / "export")
    folders = {data: "data set", checkpoint: "checkpoint", export: "export"}
    for folder in folders:
        (folder / "manifest.json").unlink()
        if manifest is not None:
            (folder / "manifest.json").write_text(manifest)
    for folder, kind in folders.items():
        [finding] = verify(folder)
        assert (finding.path, finding.kind) == (folder, kind)
        assert "manifest" in finding.problems[0]
    assert [finding.kind for finding in verify(run)] == ["checkpoint", "export"]


def test_a_folder_is_named_as_what_its_manifest_lists(tmp_path: Path) -> None:
    for name, kind in (("config.json", "export"), ("generators_00000.pt", "checkpoint")):
        folder = folder_with_manifest(tmp_path / kind, name)
        for file in (name, "weights.bin"):
            (folder / file).unlink()
        [finding] = verify(folder)
        assert (finding.kind, finding.problems) == (kind, ["weights.bin: missing", f"{name}: missing"])


def test_an_export_without_its_configuration_is_found_in_a_run(tmp_path: Path) -> None:
    for folder in ("export", "export/step_00000002"):
        (folder_with_manifest(tmp_path / folder) / "config.json").unlink()
    assert [finding.problems for finding in verify(tmp_path)] == [["config.json: missing"]] * 2


def test_a_run_without_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    (tmp_path / "checkpoints").mkdir()
    assert main(["verify", str(tmp_path)]) == 2
    assert "has neither a checkpoint nor an export yet" in capsys.readouterr().err
    (tmp_path / "checkpoints").rmdir()
    folder_with_manifest(tmp_path / "export")
    assert [finding.kind for finding in verify(tmp_path)] == ["export"]


def test_files_in_folders_of_an_export_are_named_with_them(tmp_path: Path) -> None:
    folder = folder_with_manifest(tmp_path / "export")
    (folder / "quantized").mkdir()
    (folder / "quantized" / "weights.bin").write_bytes(b"1")
    write_manifest(folder, {"files": file_facts(folder, ["weights.bin", "quantized/weights.bin"])})
    (folder / "quantized" / "weights.bin").unlink()
    assert verify(folder)[0].problems == ["quantized/weights.bin: missing"]


def test_nothing_to_verify_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "none")]) == 2
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("name a run, a checkpoint, an export or a data set") == 2


def test_damage_beside_the_rows_of_a_data_set_is_found(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    file = folder / "train" / "lengths.npy"
    whole = file.read_bytes()
    lengths = np.load(file)
    lengths[:5] = 7
    np.save(file, lengths)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    first, second = verify(folder)[0].problems
    assert first == f"{file} does not fit the rows in the Arrow files"
    assert second.startswith(f"tokenizer path '{folder / 'tokenizer'}' cannot be read: ")
    for torn in (whole[: len(whole) // 2], b"", b"x"):
        file.write_bytes(torn)
        assert len(verify(folder)[0].problems) == 1
    file.unlink()
    assert "lengths.npy" in verify(folder)[0].problems[0]


def test_a_tokenizer_that_was_exchanged_is_found(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    file = folder / "tokenizer" / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    assert '"the"' in text
    file.write_text(text.replace('"the"', '"teh"'), encoding="utf-8")
    [problem] = verify(folder)[0].problems
    assert problem.startswith(f"{folder / 'tokenizer'}: sha256 is ")


def test_what_a_killed_conversion_left_is_to_be_deleted_by_hand(tmp_path: Path) -> None:
    """No save ever removes it."""
    (tmp_path / "checkpoints" / "step_00000004.universal").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000006.tmp").mkdir()
    (tmp_path / "export" / "step_00000002.tmp").mkdir(parents=True)
    found = {finding.path.name: finding.problems for finding in verify(tmp_path)}
    assert found == {
        "step_00000004.universal": ["left by a start with another number of ranks that was killed; delete it"],
        "step_00000006.tmp": ["half-written; the next save removes it"],
        "step_00000002.tmp": ["left by an export that was stopped, unless one is being written now; delete it"],
    }
