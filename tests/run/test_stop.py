"""Which processes above a rank are watched as its launchers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RANK = "from dwt_ds.run.stop import _launchers_above; print(len(_launchers_above()))"


@pytest.mark.parametrize(
    ("command", "launchers"),
    [
        ("deepspeed", 1),
        ("deepspeed.launcher.runner", 1),
        ("deepspeed.launcher.launch", 1),
        ("dwt-ds launch", 1),
        ("dwt_ds.cli.main launch", 1),
        ("dwt-ds study", 0),
        ("another launch", 0),
    ],
)
def test_launchers_are_known_by_their_names(command: str, launchers: int, tmp_path: Path) -> None:
    name, *words = command.split()
    (tmp_path / name).write_text(f"{sys.executable} -c '{RANK}'\nexit 0\n", encoding="utf-8")
    done = subprocess.run(["sh", str(tmp_path / name), *words], capture_output=True, text=True)
    assert done.stdout == f"{launchers}\n", done.stderr
