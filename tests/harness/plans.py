"""`dwt-ds plan` in a folder without data or teachers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwt_ds.cli.main import main


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints."""
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out
