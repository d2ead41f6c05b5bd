"""Whether what lies in a folder is what was written there: runs, checkpoints, exports and data sets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dwt_ds.base.files import MANIFEST, former_folder, problems, read_json, unfinished_folder
from dwt_ds.base.run_files import CHECKPOINTS, EXPORT, RECIPE
from dwt_ds.data.manifest import MANIFEST_TABLE_NAME, UNFINISHED_NAME
from dwt_ds.data.prepared import TRAIN, VALIDATION, data_problems

_NAME_ONE = "name a run, a checkpoint, an export or a data set"
_OF_A_DATA_SET = {TRAIN, VALIDATION, UNFINISHED_NAME, MANIFEST_TABLE_NAME}


class Finding(NamedTuple):
    """What verification says of one folder."""

    path: Path
    kind: str
    """checkpoint, export, data set, or unfinished."""
    problems: list[str]
    """One line each, empty if all is well."""


def verify(path: Path) -> list[Finding]:
    """Check every manifest at `path`, which may be a run's folder, a checkpoint, an export or a data set.

    Raises ValueError if there is nothing to check.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; {_NAME_ONE}")
    if any((path / name).exists() for name in (RECIPE, CHECKPOINTS, EXPORT)):
        return _verify_run(path)
    kind = _kind({file.name for file in path.iterdir()}) or _kind(_listed(path))
    if kind is None:
        raise ValueError(f"{path}: holds nothing that has a {MANIFEST}; {_NAME_ONE}")
    return [_verify_one(path, kind)]


def _verify_run(run: Path) -> list[Finding]:
    found = []
    for folder in _folders(run / CHECKPOINTS):
        if folder.name.endswith(".tmp"):
            found.append(Finding(folder, "unfinished", ["half-written; the next save removes it"]))
        elif folder.name.endswith(".universal"):
            left = "left by a start with another number of ranks that was killed; delete it"
            found.append(Finding(folder, "unfinished", [left]))
        else:
            found.append(_verify_one(folder, "checkpoint"))
    export = run / EXPORT
    steps = [folder for folder in _folders(export) if folder.name.lstrip(".").startswith("step_")]
    for folder in [former_folder(export), unfinished_folder(export), export, *steps]:
        if folder.suffix in (".tmp", ".former"):
            if folder.is_dir():
                left = "left by an export that was stopped, unless one is being written now; delete it"
                found.append(Finding(folder, "unfinished", [left]))
        elif folder.is_dir() and (folder != export or any(path.is_file() for path in folder.iterdir())):
            found.append(_verify_one(folder, "export"))
    if not found:
        raise ValueError(f"{run}: has neither a checkpoint nor an export yet")
    return found


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("*") if path.is_dir())


def _kind(names: set[str]) -> str | None:
    """What a folder of files with these names is; None where they tell nothing."""
    if names & _OF_A_DATA_SET:
        return "data set"
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        return "export"
    return "checkpoint" if any(name.endswith(".pt") for name in names) else None


def _listed(folder: Path) -> set[str]:
    """Names in the folder's manifest, where it can be read."""
    try:
        content = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return set()
    files = content.get("files")
    return {TRAIN} if "shards" in content else set(files) if isinstance(files, dict) else set()


def _verify_one(folder: Path, kind: str) -> Finding:
    return Finding(folder, kind, data_problems(folder) if kind == "data set" else problems(folder))
