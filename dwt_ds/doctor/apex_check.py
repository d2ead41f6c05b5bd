"""Whether an installed apex is NVIDIA's, and works."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check_apex() -> dict[str, Any]:
    """`installed`, and `problem`: the package index has another package of this name, and NVIDIA's builds without its
    CUDA extensions and then fails where it is used. The probes are those that a run relies on."""
    spec = find_spec("apex")
    if spec is None:
        return {"installed": False, "problem": ""}
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "normalization").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        return {"installed": True, "problem": "not NVIDIA's package"}
    import torch

    from dwt_ds.engine.optimizers import unusable_reason
    from dwt_ds.models.swaps import why_not_apex

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = {"FusedLayerNorm": why_not_apex(device)}
    reasons |= {name: unusable_reason(f"apex.{name}", device) for name in ("FusedAdam", "FusedLAMB")}
    return {"installed": True, "problem": "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)}
