"""Which module computes the rows."""

from __future__ import annotations

from types import ModuleType

from dwt_kernels import torch_backend


def backend_module(name: str) -> ModuleType:
    if name == "torch":
        return torch_backend
    from dwt_kernels import triton_backend

    return triton_backend
