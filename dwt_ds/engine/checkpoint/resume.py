"""Resuming: find the newest good checkpoint and load it, on the same or another number of ranks."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.checkpoint import ds_to_universal

from dwt_ds.base.files import plain_name, problems, read_manifest
from dwt_ds.engine.checkpoint.manifest import RunState
from dwt_ds.engine.checkpoint.save import complete_checkpoints, restore_generators
from dwt_ds.engine.optimizers import replay_adam_steps
from dwt_ds.engine.ranks import barrier, broadcast_from_rank_0, raise_on_all_ranks, rank, world_size
from dwt_ds.engine.student import StudentEngine, disable_min_scale_error


class NewestCheckpoint(NamedTuple):
    """Where a run resumes."""

    path: Path | None
    """The newest complete checkpoint whose files match its manifest; None if there is none."""
    damaged: list[str]
    """What is wrong with newer ones, one line each."""


def agree_on_newest_checkpoint(folder: Path) -> NewestCheckpoint:
    """`newest_checkpoint` as rank 0 finds it, on every rank."""
    found: NewestCheckpoint = broadcast_from_rank_0(newest_checkpoint(folder) if rank() == 0 else None)
    return found


def newest_checkpoint(folder: Path) -> NewestCheckpoint:
    """The newest good checkpoint in a run's `checkpoints/`; reads and verifies all files of those it looks at."""
    damaged: list[str] = []
    for path in reversed(complete_checkpoints(folder)):
        wrong = problems(path)
        if not wrong:
            return NewestCheckpoint(path, damaged)
        damaged.append(f"{path.name}/{wrong[0]}")
    return NewestCheckpoint(None, damaged)


def check_world_size(path: Path, zero_stage: int) -> None:
    """Whether this number of ranks can resume from a checkpoint; before anything of the run is built.

    Raises:
        ValueError: it was written by another number, which this ZeRO stage does not allow.
    """
    wrote = read_manifest(path)["world_size"]
    if wrote != world_size() and zero_stage not in (1, 2):
        raise ValueError(
            f"{path.name} was written by {wrote} ranks, this run has {world_size()}: ZeRO-{zero_stage} cannot resume "
            f"on a different number of ranks; start it with {wrote}"
        )


def load_checkpoint(engine: StudentEngine, path: Path, seed: int) -> tuple[RunState, dict[str, Any]]:
    """Restore student, optimizer and schedule from a verified checkpoint, written by any number of ranks.

    On the number of ranks that wrote it, random streams continue as well. On another number, DeepSpeed's universal
    checkpoint re-shards the optimizer state, and dropout draws from new streams.

    Args:
        engine: from `start_student`.
        path: from `agree_on_newest_checkpoint`, after `check_world_size`.
        seed: of the new random streams.

    Returns:
        The state to resume from, and the checkpoint's manifest.

    Raises:
        ValueError: DeepSpeed cannot read it.
    """
    manifest = read_manifest(path)
    state = RunState(**manifest["state"])
    if manifest["world_size"] == world_size():
        _load(engine, path)
        restore_generators(path / f"generators_{rank():05d}.pt")
        return state, manifest
    universal = path.parent / f"{path.name}.universal"
    with raise_on_all_ranks():
        if rank() == 0:
            _convert(path, universal)
    engine._config.load_universal_checkpoint = True
    try:
        _load(engine, universal)
    finally:
        engine._config.load_universal_checkpoint = False
    barrier()  # until all have read it
    if rank() == 0:
        shutil.rmtree(universal)
    torch.manual_seed(seed + 1 + rank() + 1000003 * (state.step + 1))
    return state, manifest


def _load(engine: StudentEngine, path: Path) -> None:
    with plain_name(path) as name:  # DeepSpeed looks for files by a pattern
        folder, tag = os.path.split(name)
        loaded, _ = engine.load_checkpoint(folder, tag=tag)
    if loaded is None:
        raise ValueError(f"{path}: DeepSpeed found nothing to load; delete the folder to resume from the one before")
    engine.lr_scheduler.set_rate()  # the optimizer's state has that of the run's former length
    replay_adam_steps(engine.basic_optimizer)
    disable_min_scale_error(engine)  # the checkpoint has a loss scaler of its own


def _convert(path: Path, universal: Path) -> None:
    """Write `path` as a universal checkpoint, without the progress that the converter prints."""
    shutil.rmtree(universal, ignore_errors=True)
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with plain_name(path.parent) as folder, silent[0], silent[1]:
        options = argparse.Namespace(
            input_folder=f"{folder}/{path.name}",
            output_folder=f"{folder}/{universal.name}",
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        ds_to_universal.main(options)
