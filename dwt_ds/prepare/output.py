"""The output folder while it is being made: its lock, its settings, and how it becomes final."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dwt_ds.base.files import MANIFEST, atomic_file, read_json, sync_folder, write_json, write_text
from dwt_ds.base.locks import LOCK_NAME, FolderLock
from dwt_ds.base.trees import differences
from dwt_ds.data.manifest import MANIFEST_TABLE_NAME, UNFINISHED_NAME, Manifest, read_data_manifest
from dwt_ds.data.prepared import TOKENIZER_FOLDER, TRAIN, VALIDATION
from dwt_ds.data.show import manifest_table, warnings_of
from dwt_ds.prepare.rows import has_parts

_IDENTITY_NAME = "settings.json"


def finished_manifest(out: Path, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of `out`, made with the same settings; None if `out` is not finished.

    Raises ValueError if it was made with other settings.
    """
    if not (out / MANIFEST).exists():
        return None
    manifest = read_data_manifest(out)
    difference = _first_difference(manifest.settings["identity"], identity)
    if difference:
        raise ValueError(
            f"--out {out} already holds data made with other settings ({difference}): "
            "choose another folder, or remove this one"
        )
    return manifest


def _first_difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """In words; "" if they are equal."""
    return next((f"{name} is {before} there, {now} now" for name, before, now in differences(there, here)), "")


@contextmanager
def work_folder(out: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """The folder inside `out` to work in, locked for this process; an interruption leaves it as it is.

    It is removed once `out` has its manifest, and also after a ValueError inside the block, which the same command
    would raise again, unless it has finished parts. Raises ValueError if `out` holds something else or an unfinished
    preparation with other settings, or if another process works in it.
    """
    work = out / UNFINISHED_NAME
    if out.is_dir() and not work.is_dir() and any(path.name != LOCK_NAME for path in out.iterdir()):
        raise ValueError(f"--out {out} is not empty and holds no data folder: choose another, or remove it")
    with FolderLock(out, f"--out {out}"):
        if (out / MANIFEST).is_file():
            raise ValueError(f"--out {out}: another dwt-ds prepare has just finished it; repeat the command to use it")
        work.mkdir(exist_ok=True)
        of_no_use = False
        try:
            _begin(out, work, identity)
            try:
                yield work
            except ValueError:
                of_no_use = not has_parts(work)
                raise
            of_no_use = (out / MANIFEST).is_file()
        finally:
            if of_no_use:
                shutil.rmtree(work)


def _begin(out: Path, work: Path, identity: dict[str, Any]) -> None:
    begun = work / _IDENTITY_NAME
    if not begun.is_file():
        write_json(begun, identity)
        return
    difference = _first_difference(read_json(begun), identity)
    if difference:
        raise ValueError(
            f"--out {out} holds an unfinished preparation with other settings ({difference}): "
            "repeat that command, or remove the folder"
        )


def make_final(out: Path, manifest: Manifest) -> None:
    """Move the rows out of the work folder, copy the tokenizer, write the manifest; `work_folder` removes the rest.

    If this is interrupted before the manifest is written, the next attempt joins the stored parts again.
    """
    work = out / UNFINISHED_NAME
    for name in (TRAIN, VALIDATION):
        shutil.rmtree(out / name, ignore_errors=True)
        (work / name).rename(out / name)
    (out / TOKENIZER_FOLDER).mkdir(exist_ok=True)
    for path in sorted((work / TOKENIZER_FOLDER).iterdir()):
        with atomic_file(out / TOKENIZER_FOLDER / path.name) as file:
            file.write(path.read_bytes())
    warnings = "".join(f"warning: {warning}\n" for warning in warnings_of(manifest))
    write_text(out / MANIFEST_TABLE_NAME, manifest_table(manifest) + warnings)
    sync_folder(out)
    write_text(out / MANIFEST, manifest.to_json())
