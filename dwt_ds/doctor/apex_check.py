"""Whether an installed apex is NVIDIA's, and works."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check_apex() -> dict[str, Any]:
    """`installed`; and what is wrong with it: the package index has another package of this name, and NVIDIA's builds
    without its CUDA extension and then fails where it is used."""
    spec = find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return {"installed": spec is not None, "problem": "" if spec is None else "not NVIDIA's package"}
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "normalization").is_dir() or not (folder / "optimizers").is_dir():
        return {"installed": True, "problem": "not NVIDIA's package"}
    try:
        from apex.normalization import FusedLayerNorm

        FusedLayerNorm(8)
    except Exception as error:  # it fails in its own ways, by what was left out of its build
        return {"installed": True, "problem": f"{type(error).__name__}: {error}"}
    return {"installed": True, "problem": ""}
