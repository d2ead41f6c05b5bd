"""Saving a checkpoint of all ranks: all of it or nothing, whatever is killed and whenever.

DeepSpeed writes the shards; the commit is ours. Rank 0 names a temporary folder, every rank writes into it, success
is agreed by all, the manifest (names, sizes, sha256) is written last, the folder takes its name, and then the pointer
is replaced. A folder named step_... is therefore complete, and whether it still is what was written the manifest
tells.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dwt_ds.base.files import MANIFEST, atomic_file, file_facts, read_manifest, sync_folder, write_manifest
from dwt_ds.engine.checkpoint.generators import save_generators
from dwt_ds.engine.checkpoint.weights import master_names
from dwt_ds.engine.ranks import gather_from_ranks, local_rank, rank, world_size
from dwt_ds.engine.student import StudentEngine

POINTER = "latest"
_UNFINISHED = ".tmp"


@dataclass(frozen=True)
class RunState:
    """Where a run stands, besides what DeepSpeed saves."""

    step: int = 0
    """Optimizer steps taken, skipped ones among them."""
    rows: int = 0
    """Rows of the data stream consumed by all ranks."""
    tokens: int = 0
    """Real tokens seen by all ranks."""
    elapsed_seconds: float = 0.0
    """Training time so far, over all starts."""
    adaptive: dict[str, float] = field(default_factory=dict)
    """State of an adaptive soft weight."""
    guard: dict[str, Any] = field(default_factory=dict)
    """Skipped steps and loss history (guard.py)."""
    starts: list[dict[str, Any]] = field(default_factory=list)
    """One entry a start of the run: step, ranks, time, versions."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay; the newest complete one always does."""

    keep_last: int
    """So many of the newest; those that a resume passed over, as damaged, are not counted."""
    keep_every: int
    """Also those at multiples of so many steps; 0: none."""


def save_checkpoint(
    engine: StudentEngine, folder: Path, state: RunState, facts: dict[str, Any], retention: Retention
) -> float:
    """Write a checkpoint of all ranks, then delete those that `retention` no longer wants.

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
    try:
        _together(lambda: _clear(temporary) if rank() == 0 else None)
        _together(lambda: _write_shards(engine, folder, temporary))
        _together(lambda: _sync_files(temporary) if local_rank() == 0 else None)
        _together(lambda: _commit(folder, temporary, name, state, facts) if rank() == 0 else None)
    except OSError:
        if rank() == 0:
            # What was written of it may be what fills the disk.
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if rank() == 0:
        _delete_old(folder, state.step, retention)
    return time.perf_counter() - began


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were committed, oldest first; not verified."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and p.name[len("step_") :].isdigit())


def _together(work: Callable[[], None]) -> None:
    """Run `work`, then let every rank know whether it succeeded everywhere."""
    problem = None
    try:
        work()
    except OSError as error:
        problem = f"rank {rank()}: {error}"
    problems = [p for p in gather_from_ranks(problem) if p]
    if problems:
        raise OSError("; ".join(problems))


def _clear(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_shards(engine: StudentEngine, folder: Path, temporary: Path) -> None:
    with _writer_that_returns(engine) as failures:
        names = master_names(engine.module, engine.optimizer)
        engine.save_checkpoint(str(folder), tag=temporary.name, client_state=names, save_latest=False)
    if failures:
        raise OSError(failures[0])
    try:
        save_generators(temporary / f"generators_{rank():05d}.pt")
    except RuntimeError as error:  # torch.save's way to report a full disk
        raise OSError(str(error)) from error


@contextmanager
def _writer_that_returns(engine: StudentEngine) -> Iterator[list[str]]:
    """Within the block a failed write of this rank is noted and does not raise.

    DeepSpeed waits for all ranks after the writing: one that left by an exception would be waited for without end.
    """
    failures: list[str] = []
    writer, write = engine.checkpoint_engine, engine.checkpoint_engine.save

    def note_failure(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(Path(path).parent).free / 1e6
            failures.append(f"{Path(path).name}: {error} ({free:.0f} MB free there)")

    writer.save = note_failure
    # The script it leaves beside the shards would unpickle them unverified; `dwt-ds export` does its work.
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield failures
    finally:
        del writer.save  # the instance's; the class has its own


def _sync_files(temporary: Path) -> None:
    for file in temporary.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _commit(folder: Path, temporary: Path, name: str, state: RunState, facts: dict[str, Any]) -> None:
    names = sorted(path.name for path in temporary.iterdir() if path.is_file() and path.name != MANIFEST)
    files = file_facts(temporary, names)
    write_manifest(temporary, {"state": asdict(state), "world_size": world_size(), **facts, "files": files})
    final = folder / name
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder(folder)
    point_to(final)


def point_to(checkpoint: Path) -> None:
    """Make `checkpoint` the one that the pointer names."""
    with atomic_file(checkpoint.parent / POINTER) as file:
        file.write(f"{checkpoint.name}\n".encode())


def _delete_old(folder: Path, saved: int, retention: Retention) -> None:
    """Delete what is older than the `keep_last` newest that the run itself went through, up to step `saved`.

    A resume passes over damaged checkpoints, and they stay where they are. To look for the damage would mean to read
    all of them at each save; that the run went on from before them, their manifests tell.
    """
    by_step = {int(path.name[len("step_") :]): path for path in complete_checkpoints(folder)}
    ours = _starts(by_step[saved])
    behind = [step for step, path in by_step.items() if step <= saved and _went_through(ours, step, _starts(path))]
    for step, path in by_step.items():
        old = bool(behind) and step < behind[-retention.keep_last :][0]
        if old and (retention.keep_every == 0 or step % retention.keep_every):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"*{_UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


def _starts(checkpoint: Path) -> list[dict[str, Any]] | None:
    """The starts that led to a checkpoint; None where its manifest does not tell."""
    try:
        return list(read_manifest(checkpoint)["state"]["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _went_through(ours: list[dict[str, Any]] | None, step: int, starts: list[dict[str, Any]] | None) -> bool:
    """Whether a run of the starts `ours` has been at the checkpoint of `step` with `starts` behind it."""
    if ours is None or starts is None or ours[: len(starts)] != starts:
        return False
    return len(starts) == len(ours) or step <= int(ours[len(starts)]["step"])
