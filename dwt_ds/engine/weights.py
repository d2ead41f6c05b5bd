"""The student's full-precision weights, out of any ZeRO stage."""

from __future__ import annotations

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn


@torch.no_grad()
def full_fp32_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """State dict of `model` in fp32 on the CPU, tied weights once; every rank must call it, those with `keep` get it.

    Under bf16 and fp16 the optimizer holds the exact weights, in shards; the model's own are their rounded copies.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        if keep:
            weights[name] = (parameter if full is None else full).detach().to("cpu", torch.float32, copy=True)
    if keep:
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved:
                weights[name] = buffer.detach().to("cpu", copy=True)
    return weights
