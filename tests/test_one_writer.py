"""Every command that writes a folder refuses one that another process writes, and leaves it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.runs import write_run
from harness.writers import Hold

from dwt_ds.base import locks
from dwt_ds.base.software import host_name
from dwt_ds.cli.main import main
from dwt_ds.config.schema import RunConfig


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 0.3)


def refused(arguments: list[object], out: Path, owner: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    assert main([str(word) for word in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"process {owner} on host {host_name()} has been writing there since" in error, error
    assert error.startswith(f"error: --out {out}: "), error
    assert {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")} == before


def test_prepare(
    hold: Hold, tiny_text: Path, tiny_vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["prepare", "--text", tiny_text, "--tokenizer", tiny_vocabulary, "--out", out]
    refused(arguments, out, hold(out), capsys)


def test_report(hold: Hold, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, {2: 5.0}, RunConfig().to_dict())
    owner = hold(out)
    hold(run)  # a run in progress may be drawn
    refused(["report", run, "--out", out], out, owner, capsys)
    assert main(["report", str(run)]) == 0


def test_study(hold: Hold, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["study", "remapping", "--out", out, f"data.dir={tiny_data}"]
    refused(arguments, out, hold(out), capsys)


def test_export(hold: Hold, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    out = tmp_path / "out"
    refused(["export", tmp_path / "run", "--out", out], out, hold(tmp_path, ".out.writer"), capsys)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "run" / "export")]) == 2
    assert "the run itself writes there; name another folder" in capsys.readouterr().err
