"""Padded rows as tensors, for the models, and as the bytes that loader processes send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def int64(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64, copy=False))


def as_bytes(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """`__reduce__` of a named tuple with tensors, for loader processes: sharing a tensor would take a file descriptor
    and more time than sending its bytes."""
    return _from_bytes, (type(batch), *(each.numpy() if isinstance(each, Tensor) else each for each in batch))


def _from_bytes(kind: Callable[..., Any], *values: Any) -> Any:
    return kind(*(torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in values))


def on_device(device: torch.device, batch: Any) -> Any:
    """`batch`, tuples with CPU tensors, on `device`. Tensors that no loader pinned are pinned first, or the host would
    wait for the copy."""
    on_gpu = device.type == "cuda"
    return tree_map_only(Tensor, lambda t: (t.pin_memory() if on_gpu else t).to(device, non_blocking=True), batch)


def is_real(lengths: np.ndarray, width: int) -> np.ndarray:
    """(B, S) bool, true on real tokens of rows of `lengths` (B,) tokens."""
    return np.arange(width)[None, :] < lengths[:, None]


def attention_mask(lengths: np.ndarray, width: int) -> Tensor | None:
    """(B, S) int64, 1 on real tokens; None if there is no padding."""
    real = is_real(lengths, width)
    return None if real.all() else int64(real)
