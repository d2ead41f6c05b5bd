"""Attention masks in the cheapest form for an encoder, without a host synchronisation.

Hugging Face's encoders check whether a mask is all ones, to skip it. For a mask on a GPU the host waits for that check
at every step. So a full mask on the CPU is dropped here, and a mask on a GPU is expanded to the finished 4-D mask,
which the encoders use unchecked. Callers that know that their rows are full pass no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def encoder_mask(model: PreTrainedModel, attention_mask: Tensor | None) -> Any:
    """The `attention_mask` argument for the encoder of a known family.

    Args:
        model: the masked language model whose encoder will run.
        attention_mask: (B, S), nonzero on real tokens; None if every token is real.

    Returns:
        None, the mask itself, or the finished mask.
    """
    if attention_mask is None:
        return None
    if attention_mask.device.type == "cpu":
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            return None
        return attention_mask
    return finished_mask(model, attention_mask)


def finished_mask(model: PreTrainedModel, attention_mask: Tensor) -> Any:
    """The mask in the form that the encoder's attention uses unchecked.

    Args:
        model: as for `encoder_mask`.
        attention_mask: (B, S), nonzero on real tokens.

    Returns:
        (B, 1, S, S), boolean for sdpa and additive for eager attention; for ModernBERT a mapping of those by type of
        layer; for other attention implementations the mask itself.
    """
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return attention_mask
    batch, length = attention_mask.shape
    full = attention_mask.bool()[:, None, None, :].expand(batch, 1, length, length)
    if model.config.model_type != "modernbert":
        return _for_attention(full, model)
    place = torch.arange(length, device=attention_mask.device)
    near = (place[:, None] - place[None, :]).abs() <= model.config.sliding_window
    return {"full_attention": _for_attention(full, model), "sliding_attention": _for_attention(full & near, model)}


def _for_attention(allowed: Tensor, model: PreTrainedModel) -> Tensor:
    if model.config._attn_implementation == "sdpa":
        return allowed
    zero = torch.zeros((), dtype=model.dtype, device=allowed.device)
    return zero.where(allowed, torch.finfo(model.dtype).min)
