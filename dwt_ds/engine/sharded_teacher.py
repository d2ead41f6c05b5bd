"""A teacher whose weights are cut over the ranks, for those too large to be whole on each."""

from __future__ import annotations

import deepspeed
import torch
from torch import nn

# Each weight is used once in a forward pass, so none is kept for a second use.
_ZERO_3 = {"stage": 3, "stage3_max_reuse_distance": 0}


def shard_over_ranks(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """ZeRO-3's forward pass without an optimizer: each module's weights are gathered before it runs, then let go
    (Rajbhandari et al. 2020, section 5.3; DeepSpeed calls it ZeRO-Inference).

    Every rank has to call the result equally often.

    Args:
        model: whole, on the CPU, frozen; its parameters are cut in place.
        dtype: of its weights.
    """
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants one; nothing is trained
        "zero_optimization": _ZERO_3,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine
