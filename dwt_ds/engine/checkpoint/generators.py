"""The random generators of a rank, saved and restored; DeepSpeed saves none of them."""

from __future__ import annotations

import ast
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


def save_generators(path: Path) -> None:
    """Write this rank's random state as tensors and plain values, so that it loads without unpickling objects."""
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
    """Continue this rank's random streams where `save_generators` left them."""
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["torch"])
    random.setstate(ast.literal_eval(state["python"]))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    if "device" in state:
        get_accelerator().set_rng_state(state["device"])
