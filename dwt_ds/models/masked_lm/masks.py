"""Attention masks in the form that costs an encoder least, without asking the GPU what they hold.

Hugging Face's encoders look whether a mask is all ones before they skip it. On a GPU that look makes the host wait at
every step. So a mask that arrives on the CPU is dropped here when it is full, and one on a GPU is handed on as the
finished 4-D mask, which the encoders take as it is. Callers that know their rows are full pass no mask at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def encoder_mask(model: PreTrainedModel, attention_mask: Tensor | None) -> Any:
    """The `attention_mask` argument for a BERT, RoBERTa, DistilBERT or ModernBERT encoder.

    Args:
        model: the masked language model whose encoder will run.
        attention_mask: (B, S), nonzero on real tokens; None where every token is real.

    Returns:
        None, the mask itself, or a finished one.
    """
    if attention_mask is None:
        return None
    if attention_mask.device.type == "cpu":
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            return None
        return attention_mask
    return finished_mask(model, attention_mask)


def finished_mask(model: PreTrainedModel, attention_mask: Tensor) -> Any:
    """The mask in the form that the encoder's attention takes without a further look at it.

    Args:
        model: as for `encoder_mask`.
        attention_mask: (B, S), nonzero on real tokens.

    Returns:
        (B, 1, S, S), boolean for sdpa and additive for eager attention; for ModernBERT a mapping of those by layer
        type; for other implementations the mask as it is.
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
