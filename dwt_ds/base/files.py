"""Files and folders that appear whole or not at all; manifests that tell whether files are still what was written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

MANIFEST = "manifest.json"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write; it takes its name once the block ends well and its bytes are on disk, else it goes."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def replace_folder(finished: Path, folder: Path) -> None:
    """Give `finished` the name of `folder`, which goes if it exists; a half-deleted one never has that name."""
    former = folder.with_name(folder.name + ".old")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    finished.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make names given in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_facts(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> size in bytes and sha256 of files in `folder`."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write `folder`'s manifest, whole or not at all; `content["files"]` is what `file_facts` says of every file."""
    with atomic_file(folder / MANIFEST) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a folder (OSError: there is none; ValueError: damaged)."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("lists no files")
    return manifest


def problems(folder: Path) -> list[str]:
    """One line a file of `folder` that does not match its manifest; empty if all do."""
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: {error}"]
    found = (_problem(folder / name, expected) for name, expected in manifest["files"].items())
    return [problem for problem in found if problem]


def _problem(file: Path, expected: dict[str, Any]) -> str:
    if not file.is_file():
        return f"{file.name}: missing"
    size = file.stat().st_size
    if size != expected["bytes"]:
        return f"{file.name}: {size} bytes, the manifest says {expected['bytes']}"
    if file_sha256(file) != expected["sha256"]:
        return f"{file.name}: the contents have changed (sha256 differs)"
    return ""
