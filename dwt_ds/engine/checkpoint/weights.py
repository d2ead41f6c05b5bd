"""The student's fp32 weights under any ZeRO stage, from a running engine or from a checkpoint.

Under bf16 and fp16 the optimizer has the fp32 master weights; the model's own are copies rounded to 16 bits.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from dwt_ds.base.files import plain_name

WITHOUT_ZERO = (FP16_Optimizer, FP16_UnfusedOptimizer)
"""DeepSpeed's wrappers of an optimizer under bf16 or fp16 without ZeRO."""

MASTER_NAMES = "dwt_ds_master_names"
"""Key in such a run's checkpoint: the names of its masters, by parameter group, in the optimizer's order."""


def remember_masters(optimizer: Any) -> None:
    """Link each parameter to its master, as ZeRO's optimizers do and those `WITHOUT_ZERO` do not."""
    for parameters, held in zip(optimizer.fp16_groups, held_masters(optimizer)):
        for parameter, master in zip(parameters, cut_like(parameters, held)):
            parameter._dwt_ds_master = master


def held_masters(optimizer: Any) -> list[list[Tensor]]:
    """Of an optimizer `WITHOUT_ZERO`, by parameter group: a tensor for each parameter, or one flat tensor for all."""
    if isinstance(optimizer, FP16_Optimizer):
        return [[flat] for flat in optimizer.fp32_groups_flat]
    return list(optimizer.fp32_groups)


def cut_like(parameters: list[Tensor], held: list[Tensor]) -> list[Tensor]:
    """Views of what `held_masters` gives for a group, one of each parameter's shape."""
    if len(held) == 1:
        held = list(held[0].flatten().split([parameter.numel() for parameter in parameters]))
    return [each.detach().view_as(parameter) for each, parameter in zip(held, parameters)]


def master_names(module: nn.Module, optimizer: Any) -> dict[str, list[list[str]]]:
    """What to add to a checkpoint so that its masters can be found by name; {} for optimizers that do not need it."""
    if not isinstance(optimizer, WITHOUT_ZERO):
        return {}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {MASTER_NAMES: [[names[id(parameter)] for parameter in group] for group in optimizer.fp16_groups]}


@torch.no_grad()
def full_fp32_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """State dict of `model` in fp32 on the CPU, tied weights once. Every rank must call it; with `keep` False it is {}.

    Parameters that are not trained have no master: theirs are the model's own, rounded values.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        if full is None:
            full = getattr(parameter, "_dwt_ds_master", None)
        # ZeRO-3 shards frozen parameters, too.
        with GatheredParameters([parameter] if full is None else []):
            if keep:
                weights[name] = (parameter if full is None else full).detach().to("cpu", torch.float32, copy=True)
    if keep:
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved:
                weights[name] = buffer.detach().to("cpu", copy=True)
    return weights


def checkpoint_fp32_weights(path: Path) -> dict[str, Tensor]:
    """The trained module's fp32 weights from a checkpoint of any ZeRO stage, on the CPU, without starting ranks.

    DeepSpeed's files are pickles, which can run code when they are loaded: pass only a checkpoint of your own whose
    files match their manifest (`base.files.problems`).
    """
    exact: dict[str, Tensor] = {}
    if any(path.glob("*zero_pp_rank_*optim_states.pt")):
        with plain_name(path) as name, contextlib.redirect_stdout(io.StringIO()):
            folder, tag = os.path.split(name)
            exact = get_fp32_state_dict_from_zero_checkpoint(folder, tag=tag)
        exact = {name: tensor.float() for name, tensor in exact.items()}
    whole = path / "mp_rank_00_model_states.pt"
    if not whole.is_file():
        return exact  # of ZeRO-3, whose files have the frozen parameters
    saved = torch.load(whole, map_location="cpu", weights_only=False)
    module = saved["module"]
    optimizer = saved["optimizer"] or {}
    held = [[flat] for flat in optimizer.get("fp32_groups_flat", [])] or optimizer.get("fp32_groups", [])
    for names, masters in zip(saved.get(MASTER_NAMES, []), held):
        exact |= zip(names, cut_like([module[name] for name in names], masters))
    # Tied weights have several names and one master.
    tied = {module[name].data_ptr(): tensor for name, tensor in exact.items() if name in module}
    for name, tensor in module.items():
        exact.setdefault(name, tied.get(tensor.data_ptr(), tensor.float() if tensor.is_floating_point() else tensor))
    return exact
