"""Files and folders that appear complete or not at all; manifests that tell whether files have changed since.

What is written goes through symbolic links: the link stays, and what it points to gets the new contents.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from dwt_ds.base.words import nearest
from dwt_ds.base.yaml_and_json import json_text

MANIFEST = "manifest.json"
_OWN_SUM = "manifest_sha256"


def check_no_file(path: Path, said: str) -> None:
    """Raise a ValueError that begins with `said` where `path`, which should be a folder, or one above it is a file."""
    file = next((each for each in (path, *path.parents) if each.exists() and not each.is_dir()), None)
    if file is not None:
        raise ValueError(f"{said}: {file} is a file; name a folder")


def through_links(path: Path) -> Path:
    """Where writing to `path` ends up: absolute, without symbolic links, whether or not it exists yet.

    Raises OSError where the links lead in a circle.
    """
    found = Path(os.path.realpath(path))
    if found.is_symlink():
        raise OSError(f"{path}: its symbolic links lead in a circle; remove one")
    return found


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Create a folder and those above it, also where `path` is a link to a folder that does not exist yet."""
    through_links(path).mkdir(parents=True, exist_ok=True, mode=mode)


@contextmanager
def plain_name(folder: Path) -> Iterator[str]:
    """Another name for `folder`, made of letters, digits and slashes only, for libraries that read `*` or `[` in a path
    as a pattern. It holds within the block and within this process.

    Raises OSError where there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def escape_existing(pattern: str) -> str:
    """A glob pattern whose leading folders stand for themselves where they exist: of `run[1]/*.txt` only `*.txt` is a
    pattern if there is a folder `run[1]`."""
    folder = next(path for path in Path(pattern).parents if path.is_dir() or path in (Path(), Path("/")))
    rest = Path(pattern).relative_to(folder)
    return str(Path(glob.escape(str(folder)), rest))


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write. It gets its name when the block ends without error and its bytes are on disk."""
    path = through_links(path)
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


def unfinished_folder(folder: Path) -> Path:
    """Where to write what `replace_folder` will call `folder`: beside it, or beside what it is a link to."""
    folder = through_links(folder)
    return folder.with_name(folder.name + ".tmp")


def former_folder(folder: Path) -> Path:
    """Where `replace_folder` keeps the former contents while it works; it remains only after a kill at that moment."""
    folder = through_links(folder)
    return folder.with_name(f".{folder.name}.former")


def replace_folder(finished: Path, folder: Path) -> None:
    """Make `finished`, which is `unfinished_folder(folder)`, the contents of `folder`, and delete the former ones.

    A half-deleted folder never has the name `folder`. If that is a symbolic link, it then points to the new contents.
    The files get the modes that the umask asks for, as if `open` had made them; safetensors makes its files private.
    """
    folder, former = through_links(folder), former_folder(folder)
    _follow_umask(finished)
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    try:
        finished.rename(folder)
    except OSError:
        if former.exists():
            former.rename(folder)
        raise
    shutil.rmtree(former, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raises ValueError, OSError where `folder` is a symbolic link that `replace_folder` could not write through."""
    if not folder.is_symlink():
        return
    target = through_links(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{folder} is a link to {target}, which is not a folder; remove the link")
    above = next(path for path in target.parents if path.exists())
    if not os.access(above, os.W_OK | os.X_OK) or target.is_mount():
        raise ValueError(
            f"{folder} is a link to {target}, which cannot be replaced by a new folder of that name; "
            f"point the link to a folder inside {target}"
        )


def _follow_umask(folder: Path) -> None:
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sync_folder(folder: Path) -> None:
    """Write the names of a folder's files to disk, so that they survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def appears(path: Path, seconds: float) -> bool:
    """Whether `path`, which another host writes, is visible here within so many seconds."""
    waited_until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > waited_until:
            return False
        time.sleep(0.2)
        with suppress(OSError):
            # A listing asks the file server again; a lookup of the name alone may not.
            os.listdir(next(folder for folder in path.parents if folder.is_dir()))
    return True


def file_sha256(path: Path) -> str:
    """Hex digits of the sha256 of a file's contents."""
    digest = hashlib.sha256()
    add_to_digest(digest, path)
    return digest.hexdigest()


def add_to_digest(digest: hashlib._Hash, path: Path) -> None:
    """Update a digest with a file's contents, a block at a time."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def file_facts(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> {"bytes": size, "sha256": hex digits} of files in `folder`."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file that has one a line; without the last if a kill left it torn. Empty if the file is not there.

    Raises ValueError, with the number of the line, for a damaged one.
    """
    if not path.is_file():
        return []
    objects = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            objects.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}: line {number} is damaged; correct it, or remove it and lose its step") from None
    return objects


def find_file(name: str, packaged: Mapping[str, Path], what: str) -> Path:
    """The file at the path `name`, or else the one of that name in `packaged` (name -> path).

    Raises FileNotFoundError, with the nearest packaged name, if there is neither. `what` is the kind of the file.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name not in packaged:
        raise FileNotFoundError(
            f"{what} {name!r}: no such file and no packaged {what} of that name{nearest(name, packaged)} "
            f"(packaged: {', '.join(sorted(packaged))})"
        )
    return packaged[name]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object to a JSON file atomically."""
    write_text(path, json_text(content))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; OSError if it cannot be read, ValueError if it holds something else, which name it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not a JSON object")
    return content


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of `folder`; `content["files"]` is what `file_facts` returned for its files."""
    write_json(folder / MANIFEST, {**content, _OWN_SUM: _sum_of(content)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest that `write_manifest` wrote (OSError: there is none; ValueError: it is damaged)."""
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise ValueError("lists no files")
    written = manifest.pop(_OWN_SUM, None)  # earlier versions wrote none
    if written not in (None, _sum_of(manifest)):
        raise ValueError("the contents have changed (sha256 differs)")
    return manifest


def _sum_of(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest's contents, the same before it is written and after it is read."""
    return hashlib.sha256(json_text(manifest).encode()).hexdigest()


def problems(folder: Path) -> list[str]:
    """One line per file of `folder` that does not match its manifest; empty if all match.

    Raises PermissionError where this user may not read one: that is no damage, and a run must not begin anew for it.
    """
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: {str(error).removeprefix(f'{folder / MANIFEST}: ')}"]
    return changed_files(folder, manifest["files"])


def changed_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line a file of `folder` that is not what `files` says (as `file_facts` returns it)."""
    found = ((name, _change(folder / name, expected)) for name, expected in files.items())
    return [f"{name}: {change}" for name, change in found if change]


def _change(file: Path, expected: Mapping[str, Any]) -> str:
    if not file.is_file():
        return "missing"
    size = file.stat().st_size
    if size != expected.get("bytes"):
        return f"{size} bytes, the manifest says {expected.get('bytes')}"
    try:
        found = file_sha256(file)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"cannot be read ({error.strerror})"
    return "" if found == expected.get("sha256") else "the contents have changed (sha256 differs)"
