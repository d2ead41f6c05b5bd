"""A model's layer norms swapped for NVIDIA apex's FusedLayerNorm.

apex is built from source on machines with CUDA. Its Python files import without the CUDA extension and fail only when a
layer is constructed, and the package of that name on the Python index is another project. So a layer is constructed,
run forward and backward, and compared with torch's.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dwt_ds.base.words import one_line
from dwt_ds.config.schema import LayerNormChoice

BUILD_APEX = (
    "build NVIDIA's apex from source on a machine with CUDA (https://github.com/NVIDIA/apex, with APEX_CPP_EXT=1 and "
    "APEX_CUDA_EXT=1; the package called apex on the Python index is another project)"
)


def check_layer_norm(choice: LayerNormChoice, device: torch.device) -> None:
    """Refuse `fused.layer_norm=apex` on a machine where it cannot be used (ValueError: the reason, what to build)."""
    reason = why_not_apex(device) if choice == "apex" else ""
    if reason:
        raise ValueError(f"fused.layer_norm='apex' is not usable here ({reason}); {BUILD_APEX}, or use auto or torch")


def layer_norm_used(choice: LayerNormChoice, device: torch.device) -> Literal["apex", "torch"]:
    """What `fused.layer_norm` is on this machine; ranks must not differ in it."""
    return "torch" if choice == "torch" or why_not_apex(device) else "apex"


def fuse_layer_norms(model: nn.Module, choice: LayerNormChoice, device: torch.device) -> int:
    """Swap the layer norms of a model on `device` for apex's, in place; returns how many were swapped.

    Parameters stay the same objects under the same names. Layer norms without a bias stay torch's: apex has none
    without one. With `choice` "auto" they are swapped if apex is usable.

    Raises ValueError if apex was asked for by name and is not usable, or there is nothing to swap.
    """
    check_layer_norm(choice, device)
    if layer_norm_used(choice, device) == "torch":
        return 0
    swapped = 0
    for name, module in list(model.named_modules()):
        if type(module) is not nn.LayerNorm or module.weight is None or module.bias is None:
            continue
        fused = _fused_layer_norm(module.normalized_shape, module.eps)
        fused.weight, fused.bias = module.weight, module.bias
        model.set_submodule(name, fused.train(module.training))
        swapped += 1
    if choice == "apex" and not swapped:
        raise ValueError("fused.layer_norm='apex': the model has no layer norm with a bias to swap; use auto or torch")
    return swapped


@lru_cache
def why_not_apex(device: torch.device) -> str:
    """Why apex's FusedLayerNorm cannot be used on this device; "" if it runs and agrees with torch's."""
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        fused, plain = _fused_layer_norm((64,), 1e-5).to(device), nn.LayerNorm(64, eps=1e-5).to(device)
        pairs = [pair for rows in (values, values[:0]) for pair in zip(_run(fused, rows), _run(plain, rows))]
    except Exception as error:  # a missing package, extension or kernel each raises its own kind
        return one_line(error, with_type=True)
    agree = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)
    return "" if agree else "its results differ from torch's"


def _run(layer: nn.Module, values: Tensor) -> list[Tensor]:
    """Output, and gradients of input, weight and bias."""
    values = values.clone().requires_grad_()
    layer.zero_grad()
    out = layer(values)
    out.square().sum().backward()
    gradients = [values.grad, layer.weight.grad, layer.bias.grad]
    return [out.detach(), *(gradient for gradient in gradients if isinstance(gradient, Tensor))]


def _fused_layer_norm(shape: tuple[int, ...], eps: float) -> Any:
    return _taking_no_rows(importlib.import_module("apex.normalization").FusedLayerNorm)(shape, eps=eps)


@lru_cache
def _taking_no_rows(fused: Any) -> Any:
    """apex's layer, for batches without rows as well: it starts a block per row, and CUDA refuses to start no block."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        if hidden.numel() == 0:
            return functional.layer_norm(hidden, self.normalized_shape, self.weight, self.bias, self.eps)
        output: Tensor = fused.forward(self, hidden)
        return output

    return type(fused.__name__, (fused,), {"forward": forward})
