"""Going on from a checkpoint: choosing the newest good one, and loading it on as many ranks as there are."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.checkpoint import ds_to_universal

from dwt_ds.base.files import problems, read_manifest
from dwt_ds.engine.checkpoint.generators import restore_generators
from dwt_ds.engine.checkpoint.save import RunState, complete_checkpoints
from dwt_ds.engine.optimizers import replay_adam_steps
from dwt_ds.engine.ranks import barrier, broadcast_from_rank_0, raise_on_all_ranks, rank, world_size
from dwt_ds.engine.student import StudentEngine, disable_min_scale_error


class NewestCheckpoint(NamedTuple):
    """What there is to go on from."""

    path: Path | None
    """The newest complete checkpoint whose files match its manifest."""
    damaged: list[str]
    """What is wrong with newer ones."""


def agree_on_newest_checkpoint(folder: Path) -> NewestCheckpoint:
    """The newest good checkpoint. Rank 0 looks and tells the others."""
    return NewestCheckpoint(*broadcast_from_rank_0(newest_checkpoint(folder) if rank() == 0 else None))


def check_world_size(path: Path, zero_stage: int) -> None:
    """Whether a run of this many ranks can go on from a checkpoint; nothing of the run is needed yet.

    Raises:
        ValueError: another number wrote it, and the ZeRO stage does not allow that.
    """
    wrote = read_manifest(path)["world_size"]
    if wrote != world_size() and zero_stage not in (1, 2):
        raise ValueError(
            f"{path.name} was written by {wrote} ranks, this run has {world_size()}, and ZeRO-{zero_stage} does not go "
            f"on with another number; start it with {wrote}"
        )


def load_checkpoint(engine: StudentEngine, path: Path, seed: int) -> tuple[RunState, dict[str, Any]]:
    """Restore student, optimizer and schedule from a verified checkpoint, written by any number of ranks.

    With the number of ranks that wrote it, every rank's random streams go on as well. With another, the optimizer's
    shards are cut anew by DeepSpeed's universal checkpoint, and dropout draws from new streams.

    Args:
        engine: as `start_student` made it.
        path: from `agree_on_newest_checkpoint`, with `check_world_size` passed.
        seed: of the new random streams.

    Returns:
        The state to go on from, and the checkpoint's manifest.

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
    barrier()  # all have read it
    if rank() == 0:
        shutil.rmtree(universal)
    torch.manual_seed(seed + 1 + rank() + 1000003 * (state.step + 1))
    return state, manifest


def _load(engine: StudentEngine, path: Path) -> None:
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise ValueError(f"{path}: DeepSpeed found nothing to load; delete the folder to go on from the one before")
    replay_adam_steps(engine.basic_optimizer)
    disable_min_scale_error(engine)  # the checkpoint has a loss scaler of its own


def _convert(path: Path, universal: Path) -> None:
    """Write `path` as a universal checkpoint. Its converter prints its progress, which is not kept."""
    shutil.rmtree(universal, ignore_errors=True)
    options = argparse.Namespace(
        input_folder=str(path),
        output_folder=str(universal),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """As `agree_on_newest_checkpoint`, for one process alone."""
    wrong: list[str] = []
    for path in reversed(complete_checkpoints(folder)):
        found = problems(path)
        if not found:
            return path, wrong
        wrong.append(f"{path.name}/{found[0]}")
    return None, wrong
