"""Checkpoints that are either whole or not there.

DeepSpeed's writer moves `latest` before all ranks are done and ignores failed files, so the commit is ours: every
rank writes into a temporary folder, all agree that they succeeded, the manifest is written last, the folder gets its
name, and only then does the pointer move. Power may fail between any two of these.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from dwt_ds.engine.ranks import from_every_rank, from_rank_0, local_rank, rank, world_size
from dwt_ds.engine.student import StudentEngine

MANIFEST = "manifest.json"
POINTER = "latest"
_UNFINISHED = ".tmp"


@dataclass(frozen=True)
class RunState:
    """Where a run stands, besides what DeepSpeed saves."""

    step: int
    """Optimizer steps taken."""
    rows: int
    """Rows of the data stream consumed by all ranks."""
    tokens: int
    """Real tokens seen by all ranks."""
    elapsed_seconds: float
    """Training time so far, over all starts."""


def save_checkpoint(
    engine: StudentEngine, folder: Path, state: RunState, facts: dict[str, Any], keep_last: int
) -> float:
    """Write a checkpoint of all ranks, then delete all but the newest `keep_last` complete ones.

    Args:
        folder: the run's `checkpoints/`, seen by every rank.
        state: goes into the manifest.
        facts: what must be the same at a resume (data, tokenizer, model shape), and what is only told.

    Returns:
        Seconds that training waited.

    Raises:
        OSError: on every rank, if any rank could not write; earlier checkpoints are untouched.
    """
    began = time.perf_counter()
    name = f"step_{state.step:08d}"
    temporary = folder / (name + _UNFINISHED)
    _together(lambda: _clear(temporary) if rank() == 0 else None)
    _together(lambda: _write_shards(engine, folder, temporary))
    _together(lambda: _sync_files(temporary) if local_rank() == 0 else None)
    _together(lambda: _commit(folder, temporary, name, state, facts) if rank() == 0 else None)
    if rank() == 0:
        _delete_old(folder, keep_last)
    return time.perf_counter() - began


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint whose files match its manifest, and what is wrong with newer ones.

    Rank 0 looks and tells the others.
    """
    found: tuple[Path | None, list[str]] = (None, [])
    if rank() == 0:
        found = _newest_good(folder)
    return from_rank_0(found)


def load_checkpoint(engine: StudentEngine, path: Path) -> RunState:
    """Restore student, optimizer, schedule and the random generators of every rank from a verified checkpoint.

    Raises:
        ValueError: it was written by another number of ranks.
    """
    manifest = read_manifest(path)
    if manifest["world_size"] != world_size():
        raise ValueError(
            f"{path.name} was written by {manifest['world_size']} ranks, this run has {world_size()}; "
            f"start it with {manifest['world_size']}"
        )
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise ValueError(f"{path}: DeepSpeed found nothing to load; delete the folder to go on from the one before")
    _restore_generators(path / f"generators_{rank():05d}.pt")
    return RunState(**manifest["state"])


def read_manifest(path: Path) -> dict[str, Any]:
    """Manifest of a checkpoint folder."""
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def what_is_wrong(path: Path) -> str:
    """Empty for a complete checkpoint; else the first file that does not match the manifest, and why."""
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name}: missing"
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{name}: {size} bytes, the manifest says {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name}: the contents have changed (sha256 differs)"
    return ""


def _together(work: Any) -> None:
    """Run `work`, then let every rank know whether it succeeded everywhere."""
    problem = None
    try:
        work()
    except OSError as error:
        problem = f"rank {rank()}: {error}"
    problems = [p for p in from_every_rank(problem) if p]
    if problems:
        raise OSError("; ".join(problems))


def _clear(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_shards(engine: StudentEngine, folder: Path, temporary: Path) -> None:
    try:
        written = engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    except RuntimeError as error:  # torch.save's way to report a full disk
        raise OSError(str(error)) from error
    if not written:
        raise OSError(f"DeepSpeed could not write {temporary}")
    torch.save(_generators(), temporary / f"generators_{rank():05d}.pt")


def _sync_files(temporary: Path) -> None:
    for file in temporary.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _commit(folder: Path, temporary: Path, name: str, state: RunState, facts: dict[str, Any]) -> None:
    files = sorted(path for path in temporary.iterdir() if path.is_file())
    manifest = {
        "state": asdict(state),
        "world_size": world_size(),
        **facts,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files},
    }
    _write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    final = folder / name
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync_folder(folder)
    _write_atomically(folder / POINTER, name + "\n")


def _newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    wrong: list[str] = []
    for path in reversed(complete_checkpoints(folder)):
        problem = what_is_wrong(path)
        if not problem:
            return path, wrong
        wrong.append(f"{path.name}/{problem}")
    return None, wrong


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were committed, oldest first; not verified."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and not p.name.endswith(_UNFINISHED))


def _delete_old(folder: Path, keep_last: int) -> None:
    for path in complete_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(path, ignore_errors=True)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + _UNFINISHED)
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _generators() -> dict[str, Any]:
    """Random state of this rank as tensors and plain values, so that it loads without unpickling objects."""
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    state = {
        "torch": torch.get_rng_state(),
        "python": repr(random.getstate()),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
    }
    if get_accelerator().device_name() != "cpu":
        state["device"] = get_accelerator().get_rng_state()
    return state


def _restore_generators(path: Path) -> None:
    import ast

    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["torch"])
    random.setstate(ast.literal_eval(state["python"]))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    if "device" in state:
        get_accelerator().set_rng_state(state["device"])
