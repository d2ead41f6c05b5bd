"""A model's dropout swapped for one with cheaper random numbers, on a CPU.

It takes longer there to draw dropout's random numbers than to use them: torch draws one number per element, on one
thread. The dropout here takes four 16-bit lanes of one 64-bit draw. The probability is then a multiple of 2^-16, which
for 0.1 is off by 0.000002.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

_CPU_ATTENTION = "dwt_eager_cpu"
_LANE_VALUES = 1 << 16


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
            model.set_submodule(name, CpuDropout(module.p).train(module.training))
    if model.config._attn_implementation == "eager" and type(model)._supports_attention_backend:
        model.set_attn_implementation(_CPU_ATTENTION)


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
    """query (B, heads, S, d); key, value (B, heads or a divisor of them, S, d); attention_mask (B, 1, S, S) additive;
    returns (B, S, heads, d)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # EuroBERT, say, with fewer heads of keys and values
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.size(-1) ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    if dropout > 0 and module.training:
        weights = weights * keep_mask(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_CPU_ATTENTION, _eager_attention)
AttentionMaskInterface.register(_CPU_ATTENTION, eager_mask)
