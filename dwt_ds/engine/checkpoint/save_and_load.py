"""Saving a checkpoint of all ranks: all of it or nothing, whichever process is killed and whenever; and loading it.

Rank 0 makes a temporary folder, every rank writes its shards there with DeepSpeed's writer, all ranks agree that this
succeeded, rank 0 writes the manifest (names, sizes, sha256), the folder gets its final name, and then the pointer is
replaced. A folder named step_... is therefore complete; the manifest shows whether its files are still unchanged.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal

from dwt_ds.base.files import MANIFEST, file_facts, plain_name, read_manifest, sync_folder, write_manifest, write_text
from dwt_ds.base.words import one_line
from dwt_ds.engine.checkpoint.manifest import NewestCheckpoint, RunFacts, RunState, complete_checkpoints
from dwt_ds.engine.checkpoint.optimizer_settings import keep_optimizer_settings
from dwt_ds.engine.checkpoint.weights import master_names
from dwt_ds.engine.optimizers import place_adam_steps, replay_adam_steps
from dwt_ds.engine.ranks import barrier, gather_from_ranks, local_rank, raise_on_all_ranks, rank, world_size
from dwt_ds.engine.student import StudentEngine

POINTER = "latest"
_UNFINISHED = ".tmp"
# Where 16-bit runs without ZeRO have their fp32 weights: with DeepSpeed's FusedAdam the second, with others the first.
_MASTERS_WITHOUT_ZERO = ("fp32_groups", "fp32_groups_flat")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep besides the newest."""

    keep_last: int
    """Number of the newest to keep, not counting damaged ones that a resume skipped."""
    keep_every: int
    """Also keep those at multiples of this number of steps; 0: none."""


def save_checkpoint(
    engine: StudentEngine, folder: Path, state: RunState, facts: RunFacts, retention: Retention
) -> float:
    """Write a checkpoint of all ranks to the run's `checkpoints/`, then delete those that `retention` no longer wants.

    Returns:
        Seconds that training waited.

    Raises:
        OSError: on every rank, if any rank could not write; earlier checkpoints are unchanged.
    """
    began = time.perf_counter()
    name = f"step_{state.step:08d}"
    temporary = folder / (name + _UNFINISHED)
    try:
        _on_all_ranks(lambda: _clear(temporary) if rank() == 0 else None)
        _on_all_ranks(lambda: _write_shards(engine, folder, temporary))
        _on_all_ranks(lambda: _sync_files(temporary) if local_rank() == 0 else None)
        _on_all_ranks(lambda: _commit(folder, temporary, name, state, facts) if rank() == 0 else None)
    except OSError:
        if rank() == 0:
            # The unfinished files may be what fills the disk.
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if rank() == 0:
        with contextlib.suppress(OSError):  # the checkpoint is saved; the next one deletes these
            _delete_old(folder, state.step, retention)
    return time.perf_counter() - began


def save_generators(path: Path) -> None:
    """Write the state of this rank's random generators, which DeepSpeed does not save.

    Only tensors and plain values, so that it can be loaded with `weights_only`.
    """
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    state = {
        "torch": torch.get_rng_state(),
        "python": repr(random.getstate()),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
    }
    if get_accelerator().device_name() != "cpu":
        state["device"] = get_accelerator().get_rng_state()
    torch.save(state, path)


def restore_generators(path: Path) -> None:
    """Continue this rank's random streams from where `save_generators` saved them."""
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["torch"])
    random.setstate(ast.literal_eval(state["python"]))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    if "device" in state:
        get_accelerator().set_rng_state(state["device"])


def _on_all_ranks(work: Callable[[], None]) -> None:
    """Run `work` on this rank; raise OSError on every rank if it failed on any."""
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
    with _collect_write_failures(engine) as failures:
        names = master_names(engine.module, engine.optimizer)
        engine.save_checkpoint(str(folder), tag=temporary.name, client_state=names, save_latest=False)
    if failures:
        raise OSError(failures[0])
    try:
        save_generators(temporary / f"generators_{rank():05d}.pt")
    except RuntimeError as error:  # torch.save's way to report a full disk
        raise OSError(str(error)) from error


@contextlib.contextmanager
def _collect_write_failures(engine: StudentEngine) -> Iterator[list[str]]:
    """Collect failed writes of this rank in the block, where DeepSpeed would raise.

    After writing, DeepSpeed waits for all ranks: it would wait forever for one that had raised.
    """
    failures: list[str] = []
    writer, write = engine.checkpoint_engine, engine.checkpoint_engine.save

    def note_failure(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:
            free = ""
            with contextlib.suppress(OSError):  # a file system that is gone fails here as well
                free = f" ({shutil.disk_usage(Path(path).parent).free / 1e6:.0f} MB free there)"
            failures.append(f"{Path(path).name}: {error}{free}")

    writer.save = note_failure
    # DeepSpeed's script beside the shards would unpickle them without a check; `dwt-ds export` replaces it.
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield failures
    finally:
        del writer.save  # the instance's; the method of the class is visible again


def _sync_files(temporary: Path) -> None:
    for file in temporary.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _commit(folder: Path, temporary: Path, name: str, state: RunState, facts: RunFacts) -> None:
    names = sorted(path.name for path in temporary.iterdir() if path.is_file() and path.name != MANIFEST)
    files = file_facts(temporary, names)
    write_manifest(temporary, {"state": state.to_dict(), "world_size": world_size(), **facts.to_dict(), "files": files})
    final = folder / name
    if final.is_symlink():  # to a damaged one, which a resume passed over; it may lie on another disk
        final.unlink()
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder(folder)
    point_to(final)


def point_to(checkpoint: Path) -> None:
    """Make `checkpoint` the one that the pointer names."""
    write_text(checkpoint.parent / POINTER, f"{checkpoint.name}\n")


def _delete_old(folder: Path, saved: int, retention: Retention) -> None:
    """Delete what is older than the `keep_last` newest checkpoints that led to the one at step `saved`.

    Damaged checkpoints that a resume skipped do not count. Verifying all files at every save would be slow; the starts
    in the manifests show which checkpoints the run resumed from.
    """
    by_step = {int(path.name[len("step_") :]): path for path in complete_checkpoints(folder)}
    ours = _starts(by_step[saved])
    passed = [step for step, path in by_step.items() if step <= saved and _led_to(ours, step, _starts(path))]
    for step, path in by_step.items():
        old = bool(passed) and step < passed[-retention.keep_last :][0]
        if old and (retention.keep_every == 0 or step % retention.keep_every):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"*{_UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


def _starts(checkpoint: Path) -> list[dict[str, Any]] | None:
    """The starts of the run up to a checkpoint; None if its manifest is damaged."""
    try:
        return list(read_manifest(checkpoint)["state"]["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _led_to(ours: list[dict[str, Any]] | None, step: int, starts: list[dict[str, Any]] | None) -> bool:
    """Whether a checkpoint at `step` of a run with `starts` is part of the history of a run with the starts `ours`."""
    if ours is None or starts is None or ours[: len(starts)] != starts:
        return False
    return len(starts) == len(ours) or step <= int(ours[len(starts)]["step"])


def load_checkpoint(engine: StudentEngine, checkpoint: NewestCheckpoint, seed: int) -> None:
    """Restore student, optimizer and schedule from a verified checkpoint, written by any number of ranks.

    On the number of ranks that wrote it, random streams continue as well. On another number, DeepSpeed's universal
    checkpoint re-shards the optimizer state, and dropout draws from new streams, which `seed` decides.
    There has to be a checkpoint, and all ranks have to give the same.

    Raises:
        ValueError: DeepSpeed cannot read it.
    """
    path = checkpoint.path
    assert path is not None
    if checkpoint.manifest["world_size"] == world_size():
        _load(engine, path)
        restore_generators(path / f"generators_{rank():05d}.pt")
        return
    universal = path.parent / f"{path.name}.universal{_UNFINISHED}"  # what a kill leaves of it goes with the next save
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
        shutil.rmtree(universal, ignore_errors=True)  # the next conversion makes it anew
    torch.manual_seed(seed + 1 + rank() + 1000003 * (checkpoint.state.step + 1))


def _load(engine: StudentEngine, path: Path) -> None:
    with plain_name(path) as name:  # DeepSpeed looks for files by a pattern
        folder, tag = os.path.split(name)
        try:
            with keep_optimizer_settings(engine):
                loaded, _ = engine.load_checkpoint(folder, tag=tag)
        except KeyError as error:
            if error.args[0] not in _MASTERS_WITHOUT_ZERO:
                raise
            raise ValueError(
                f"{path}: without ZeRO, DeepSpeed's FusedAdam stores 16-bit runs in another form than other optimizers "
                "do; resume with the optimizer that wrote it (the same optimizer.params.torch_adam, and nvcc on this "
                "machine only if it was on that one), or choose another output_dir"
            ) from error
    if loaded is None:
        raise ValueError(f"{path}: DeepSpeed found nothing to load; delete the folder to resume from the one before")
    engine.lr_scheduler.set_rate()
    place_adam_steps(engine.basic_optimizer)
    replay_adam_steps(engine.basic_optimizer)


def _convert(path: Path, universal: Path) -> None:
    """Write `path` as a universal checkpoint, without the progress that the converter prints.

    Raises OSError where there is no room for it, which takes as much as `path`.
    """
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
        try:
            ds_to_universal.main(options)
        except (OSError, RuntimeError) as error:  # the latter is torch.save's way to report a full disk
            free = shutil.disk_usage(path.parent).free / 1e6
            shutil.rmtree(universal, ignore_errors=True)
            raise OSError(
                f"{path}: its optimizer state cannot be written anew for another number of ranks ({one_line(error)}; "
                f"{free:.0f} MB free there); make room, or start as many ranks as wrote it"
            ) from error
    (path.parent / "latest_universal").unlink(missing_ok=True)  # it names what is deleted once it is read
