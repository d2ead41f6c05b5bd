"""Padded rows as tensors, for the models, and as the arrays that loader processes send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def int64(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64, copy=False))


def int32_arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(tensor.to(torch.int32).numpy() for tensor in tensors)


def on_device(device: torch.device, *tensors: Tensor | None) -> Iterator[Any]:
    """Of tensors on the CPU. The host waits for a copy to a GPU unless they are pinned; a loader may have done that."""
    on_gpu = device.type == "cuda"
    pinned = (tensor.pin_memory() if on_gpu and tensor is not None else tensor for tensor in tensors)
    return (None if tensor is None else tensor.to(device, non_blocking=True) for tensor in pinned)


def is_real(lengths: np.ndarray, width: int) -> np.ndarray:
    """(B, S) bool, true on real tokens of rows of `lengths` (B,) tokens."""
    return np.arange(width)[None, :] < lengths[:, None]


def attention_mask(lengths: np.ndarray, width: int) -> Tensor | None:
    """(B, S) int64, 1 on real tokens; None if there is no padding."""
    real = is_real(lengths, width)
    return None if real.all() else int64(real)


def lengths_of(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """(B,) int64: real tokens of each row of `input_ids` (B, S), by their attention mask."""
    rows, width = input_ids.shape
    return torch.full((rows,), width) if mask is None else mask.sum(dim=1)
