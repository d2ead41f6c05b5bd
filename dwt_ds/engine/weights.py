"""The student's full-precision weights, out of any ZeRO stage."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
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


def checkpoint_fp32_weights(path: Path) -> dict[str, Tensor]:
    """The trained module's fp32 weights out of a checkpoint of any ZeRO stage, on the CPU, without starting ranks.

    DeepSpeed's files are pickles, which run code when they are read: give it only a checkpoint whose files match their
    manifest (manifest_files.problems), and only one of your own.

    Args:
        path: a committed checkpoint folder (`checkpoints/step_...`).
    """
    if any(path.glob("*zero_pp_rank_*optim_states.pt")):
        with contextlib.redirect_stdout(io.StringIO()):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name)
        return {name: tensor.float() for name, tensor in weights.items()}
    module = torch.load(path / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in module.items()}
