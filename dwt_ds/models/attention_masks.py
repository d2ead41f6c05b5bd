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
        None, the mask itself, a (B, 1, S, S) mask, or for ModernBERT a mapping of those by layer type.
    """
    if attention_mask is None:
        return None
    if attention_mask.device.type == "cpu":
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            return None
        return attention_mask
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return attention_mask
    batch, length = attention_mask.shape
    full = attention_mask.bool()[:, None, None, :].expand(batch, 1, length, length)
    if model.config.model_type != "modernbert":
        return _finished(full, model)
    place = torch.arange(length, device=attention_mask.device)
    near = (place[:, None] - place[None, :]).abs() <= model.config.sliding_window
    return {
        "full_attention": _finished(full, model),
        "sliding_attention": _finished(full & near, model),
    }


def _finished(allowed: Tensor, model: PreTrainedModel) -> Tensor:
    if model.config._attn_implementation == "sdpa":
        return allowed
    zero = torch.zeros((), dtype=model.dtype, device=allowed.device)
    return zero.where(allowed, torch.finfo(model.dtype).min)
