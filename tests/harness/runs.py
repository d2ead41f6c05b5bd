"""Finished runs as they were at an earlier checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def back_to(step: int, run: Path, copy: Path, **state: Any) -> Path:
    """A copy of a finished run, as it was when the checkpoint of `step` was complete; returns the checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "export")
    (copy / "complete.json").unlink()
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    checkpoint = next((copy / "checkpoints").glob(f"step_*{step}"))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["state"].update(state)
    manifest["state"] = {key: value for key, value in manifest["state"].items() if value != "missing"}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return checkpoint
