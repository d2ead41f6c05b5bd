"""Folders that carry a manifest of their files: writing one, and telling what no longer matches it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dwt_ds.data.atomic import atomic_file
from dwt_ds.data.prepared import file_sha256

MANIFEST = "manifest.json"


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
