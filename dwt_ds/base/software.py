"""What this process runs on: the host, and the versions of everything that can make two hosts compute differently."""

from __future__ import annotations

import hashlib
import platform
import socket
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

OUR_PACKAGES = ("dwt_ds", "dwt_kernels")
LIBRARIES = ("torch", "deepspeed", "transformers", "triton")


def host_name() -> str:
    """This machine's name, without its domain."""
    return socket.gethostname().partition(".")[0]


def software() -> dict[str, str]:
    """Name -> version of Python, the libraries and our own packages, the latter with a hash of the source.

    Python's version is major.minor, because patch releases compute the same.
    """
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    versions |= {name: library_version(name) for name in LIBRARIES}
    return versions | {name: f"{_own_version(name)} ({source_hash(name)})" for name in OUR_PACKAGES}


def library_version(name: str) -> str:
    """Version of a library: as imported in this process, else as installed, else "none"."""
    imported = getattr(sys.modules.get(name), "__version__", None)
    if imported is not None:
        return str(imported)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def source_hash(package: str) -> str:
    """First 12 hex digits of the sha256 over the names and contents of a package's Python files."""
    folder = package_folder(package)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def package_folder(package: str) -> Path:
    """The folder of a package's files."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _own_version(package: str) -> str:
    """From the source, because an editable installation keeps the version that it was installed with."""
    text = (package_folder(package) / "__init__.py").read_text(encoding="utf-8")
    return next(line.split('"')[1] for line in text.splitlines() if line.startswith("__version__"))
