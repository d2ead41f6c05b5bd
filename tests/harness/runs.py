"""Folders of runs: read, as they were at an earlier checkpoint, and written without a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from dwt_ds.base.files import read_manifest, write_manifest
from dwt_ds.run.folder import RunFolder
from dwt_ds.study.costs import work_per_token
from dwt_ds.study.records import RunRecord


def completed(ended: tuple[int, str]) -> str:
    """The output of ranks, or of a launcher, that must have ended with 0."""
    code, output = ended
    assert code == 0, output
    return output


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def change_rows(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write the metrics of a run again, each row as `change` has it."""
    rows = [change(row) for row in RunFolder(run).metrics_rows()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def untimed_rows(run: Path) -> list[dict[str, Any]]:
    """The same without what depends on the machine's speed."""
    timed = ("tokens_per_second", "elapsed_seconds", "data_wait_share", "mfu", "mfu_student")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows_of(run)]


def logged_rows(run: Path) -> dict[int, dict[str, Any]]:
    """The rows of training steps, by step."""
    return {row["step"]: row for row in rows_of(run) if "loss" in row}


def values_of(run: Path, *keys: str) -> dict[tuple[int, str], Any]:
    """What a run's metrics have under these keys, by step and key."""
    return {(row["step"], key): row[key] for row in rows_of(run) for key in keys if key in row}


def assert_same_run(run: Path, other: Path) -> None:
    """To the last bit: their metrics, and the weights that they exported."""
    assert untimed_rows(run) == untimed_rows(other)
    weights, expected = (load_file(each / "export" / "model.safetensors") for each in (run, other))
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not weights[name].equal(expected[name])] == []


def back_to(step: int, run: Path, copy: Path, **state: Any) -> Path:
    """A copy of a finished run, as it was when the checkpoint of `step` was complete; returns the checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "export")
    (copy / "complete.json").unlink()
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    checkpoint = next((copy / "checkpoints").glob(f"step_*{step}"))
    manifest = read_manifest(checkpoint)
    manifest["state"].update(state)
    manifest["state"] = {key: value for key, value in manifest["state"].items() if value != "missing"}
    write_manifest(checkpoint, manifest)
    return checkpoint


def write_run(folder: Path, losses: dict[int, float], config: dict[str, object], *, finished: bool = True) -> None:
    """A run folder with a logged step and an evaluation at each step of `losses`; 100 tokens and 1 s a step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    rows = []
    for step, loss in losses.items():
        each = {"loss": loss, "hard_loss": loss + 0.1, "soft_loss": 0.2, "soft_weight": 1.0}
        rows.append({"step": step, **each, "tokens": 100 * step, "elapsed_seconds": float(step)})
        rows.append({"step": step, "eval_hard_loss": loss, "eval_soft_loss": 0.2})
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9', encoding="utf-8"
    )
    if finished:
        (folder / "complete.json").write_text('{"steps": 12}', encoding="utf-8")


def flops_per_token(run: RunRecord) -> float | None:
    """Operations of training per real token while the teacher takes part; None if not known."""
    work = work_per_token(run)
    return None if work is None else work.per_row
