"""Modules of a model swapped for faster ones: NVIDIA apex's FusedLayerNorm, dropout with cheaper random numbers on a
CPU, and on a GPU the embedding of token types.

apex is built from source on machines with CUDA. Its Python files import without the CUDA extension and fail only when a
layer is constructed, and the package of that name on the Python index is another project. So a layer is constructed,
run forward and backward, and compared with torch's.

On a CPU it takes longer to draw dropout's random numbers than to use them: torch draws one number per element, on one
thread. The dropout here takes four 16-bit lanes of one 64-bit draw. The probability is then a multiple of 2^-16, which
for 0.1 is off by 0.000002.
"""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from dwt_ds.base.words import one_line

BUILD_APEX = (
    "build NVIDIA's apex from source on a machine with CUDA (https://github.com/NVIDIA/apex, with APEX_CPP_EXT=1 and "
    "APEX_CUDA_EXT=1; the package called apex on the Python index is another project)"
)
_CPU_ATTENTION = "dwt_eager_cpu"
_LANE_VALUES = 1 << 16


def check_layer_norm(choice: Literal["auto", "apex", "torch"], device: torch.device) -> None:
    """Refuse `fused.layer_norm=apex` on a machine where it cannot be used.

    Raises:
        ValueError: apex was asked for by name and is not usable; one line with the reason and what to build.
    """
    reason = why_not_apex(device) if choice == "apex" else ""
    if reason:
        raise ValueError(f"fused.layer_norm='apex' is not usable here ({reason}); {BUILD_APEX}, or use auto or torch")


def layer_norm_used(choice: Literal["auto", "apex", "torch"], device: torch.device) -> Literal["apex", "torch"]:
    """What `fused.layer_norm` is on this machine; ranks must not differ in it."""
    return "torch" if choice == "torch" or why_not_apex(device) else "apex"


def fuse_layer_norms(model: nn.Module, choice: Literal["auto", "apex", "torch"], device: torch.device) -> int:
    """Swap the model's layer norms for apex's, in place; parameters stay the same objects under the same names.

    Layer norms without a bias stay torch's: apex has none such.

    Args:
        model: on `device` already.
        choice: auto swaps if apex is usable; torch never does.
        device: where the model trains.

    Returns:
        Number of layer norms swapped.

    Raises:
        ValueError: apex was asked for by name and is not usable, or there is nothing to swap.
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
    """apex starts a block per row, and CUDA refuses to start none. A batch without labels has no rows."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        if hidden.numel() == 0:
            return functional.layer_norm(hidden, self.normalized_shape, self.weight, self.bias, self.eps)
        output: Tensor = fused.forward(self, hidden)
        return output

    return type(fused.__name__, (fused,), {"forward": forward})


def keep_mask(like: Tensor, probability: float) -> Tensor:
    """A tensor like `like`: 0 with the given probability, else 1 / (1 - probability). Uses torch's CPU generator."""
    words = torch.empty(math.ceil(like.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = words.view(torch.int16)[: like.numel()]
    dropped = round(probability * _LANE_VALUES)
    kept = lanes >= dropped - _LANE_VALUES // 2
    return kept.to(like.dtype).mul_(_LANE_VALUES / (_LANE_VALUES - dropped)).view(like.shape)


class CpuDropout(nn.Dropout):
    """With cheaper random numbers than torch's."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Any shape and float dtype, on a CPU."""
        return hidden * keep_mask(hidden, self.p) if self.training and self.p > 0 else hidden


def use_cpu_dropout(model: PreTrainedModel) -> None:
    """Swap the model's dropout modules, and its eager attention, in place; call it before training on a CPU."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, CpuDropout(module.p))
    if model.config._attn_implementation == "eager" and type(model)._supports_attention_backend:
        model.set_attn_implementation(_CPU_ATTENTION)


class OneTokenType(nn.Embedding):
    """For rows that are all of type 0. On a GPU the gradient of a look-up takes long if all look the same row up."""

    def forward(self, token_types: Tensor) -> Tensor:
        """(B, S) to (B, S, H)."""
        return self.weight[0].expand(*token_types.shape, -1)


def use_one_token_type(model: nn.Module) -> None:
    """Swap the embedding of token types, in place, where the model has one."""
    for name, module in list(model.named_modules()):
        if name.endswith(".token_type_embeddings") and isinstance(module, nn.Embedding):
            swapped = OneTokenType(module.num_embeddings, module.embedding_dim, device="meta")
            swapped.weight = module.weight
            model.set_submodule(name, swapped)


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_kwargs: object,
) -> tuple[Tensor, None]:
    """query, key, value (B, heads, S, d), attention_mask (B, 1, S, S) additive; returns (B, S, heads, d)."""
    scores = query @ key.transpose(2, 3) * (query.size(-1) ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    if dropout > 0 and module.training:
        weights = weights * keep_mask(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_CPU_ATTENTION, _eager_attention)
AttentionMaskInterface.register(_CPU_ATTENTION, eager_mask)
