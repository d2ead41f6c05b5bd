"""Whether what lies in a folder is what was written there: runs, checkpoints, exports and data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from dwt_ds.base.files import MANIFEST, file_sha256, problems
from dwt_ds.data.manifest import read_manifest as read_data_manifest
from dwt_ds.data.prepared import PreparedData


class Finding(NamedTuple):
    """What verification says of one folder."""

    path: Path
    kind: str
    """checkpoint, export, data set, or unfinished."""
    problems: list[str]
    """One line each, empty if all is well."""


def verify(path: Path) -> list[Finding]:
    """Check every manifest at `path`, which may be a run's folder, a checkpoint, an export or a data set.

    Raises:
        ValueError: there is nothing to check at `path`.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; name a run, a checkpoint, an export or a data set")
    if (path / "checkpoints").is_dir():
        return _verify_run(path)
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path}: has no {MANIFEST}; name a run, a checkpoint, an export or a data set")
    return [_verify_one(path)]


def _verify_run(run: Path) -> list[Finding]:
    found = []
    for folder in sorted((run / "checkpoints").iterdir()):
        if folder.name.endswith(".tmp"):
            found.append(Finding(folder, "unfinished", ["half-written; the next save removes it"]))
        elif folder.name.endswith(".universal"):
            left = "left by a start with another number of ranks that was killed; delete it"
            found.append(Finding(folder, "unfinished", [left]))
        elif folder.is_dir():
            found.append(_verify_one(folder))
    exports = [run / "export", *sorted((run / "export").glob("step_*"))]
    found += [_verify_one(folder) for folder in exports if (folder / "config.json").is_file()]
    if not found:
        raise ValueError(f"{run}: has neither a checkpoint nor an export yet")
    return found


def _verify_one(folder: Path) -> Finding:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    if isinstance(content, dict) and "shards" in content:
        return Finding(folder, "data set", _data_problems(folder))
    kind = "export" if (folder / "config.json").is_file() else "checkpoint"
    return Finding(folder, kind, problems(folder))


def _data_problems(folder: Path) -> list[str]:
    try:
        manifest = read_data_manifest(folder)
    except (OSError, ValueError) as error:
        return [str(error)]
    wrong = []
    for shard in manifest.shards:
        file = folder / shard.name
        if not file.is_file():
            wrong.append(f"{shard.name}: missing")
        elif file.stat().st_size != shard.bytes:
            wrong.append(f"{shard.name}: {file.stat().st_size} bytes, the manifest says {shard.bytes}")
        elif file_sha256(file) != shard.sha256:
            wrong.append(f"{shard.name}: the contents have changed (sha256 differs)")
    return wrong or _beside_the_rows(folder)


def _beside_the_rows(folder: Path) -> list[str]:
    """What has no checksum in the manifest: the rows themselves and the tokenizer's fingerprint tell."""
    try:
        data = PreparedData.open(folder)
    except (OSError, EOFError, ValueError) as error:
        return [str(error)]
    wrong = []
    for check in (data.train.verify_lengths, data.validation.verify_lengths, data.verify_tokenizer):
        try:
            check()
        except ValueError as error:
            wrong.append(str(error))
    return wrong
