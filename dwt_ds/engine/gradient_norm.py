"""The gradient norm of a step under ZeRO, which also tells whether the step must be skipped.

DeepSpeed 0.19.8 checks every gradient for infinities and NaNs, about a dozen operations a tensor, and then takes the
norm of every gradient, some more. On a GPU each is a launch. The norm alone is enough: it is finite exactly if every
gradient is. (The squares of finite gradients do not overflow fp64.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor

# Added to the norm by DeepSpeed before it divides.
_EPSILON = 1e-6


def take_one_norm_a_step(optimizer: Any) -> None:
    """Replace DeepSpeed's overflow check and its norms by one norm over all gradients, under ZeRO-1 to ZeRO-3.

    DeepSpeed's own code stays where gradients are offloaded, and for Muon, whose norm is that of another update.

    Args:
        optimizer: of DeepSpeed's engine; others than ZeRO's are left alone.
    """
    if "muon" in type(getattr(optimizer, "optimizer", None)).__name__.lower():
        return
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload and optimizer.compute_grad_norm:
        _under_zero_1_or_2(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.offload_optimizer:
        _under_zero_3(optimizer)


def _under_zero_1_or_2(optimizer: Any) -> None:
    """The norm is read once a step, and the gradients are clipped by the number that was read."""

    def check_overflow(partition_gradients: bool = True) -> None:
        optimizer.overflow = False  # `step` sets it if the norm is not finite

    def scaled_global_norm(norm_type: int = 2) -> float:
        gradients = [
            gradient
            for group in range(len(optimizer.bit16_groups))
            for gradient in optimizer.averaged_gradients[group]
            if not getattr(gradient, "_zero_padding", False)
        ]
        squares = _sum_of_squares(gradients, optimizer.device)
        comm.all_reduce(squares, group=optimizer.dp_process_group)
        return math.sqrt(float(squares))

    def unscale_and_clip(gradients: Iterable[Tensor], norm: float) -> None:
        scale, limit = float(optimizer.loss_scale), float(optimizer.clip_grad)
        if limit > 0:
            scale *= max((norm / scale + _EPSILON) / limit, 1.0)
        if scale != 1.0:
            torch._foreach_mul_(list(gradients), 1.0 / scale)

    optimizer.check_overflow = check_overflow
    optimizer.scaled_global_norm = scaled_global_norm
    optimizer.unscale_and_clip_grads = unscale_and_clip


def _under_zero_3(optimizer: Any) -> None:
    def check_overflow(partition_gradients: bool = True) -> None:
        optimizer.overflow = False

    def norm_of_all_groups() -> list[Tensor]:
        groups = range(len(optimizer.fp16_groups))
        gradients = [gradient for group in groups for gradient in optimizer.averaged_gradients[group]]
        squares = _sum_of_squares(gradients, optimizer.device)
        comm.all_reduce(squares, group=optimizer._get_param_partition_group(optimizer.fp16_groups[0][0]))
        return [squares.sqrt()]

    optimizer.check_overflow = check_overflow
    optimizer._get_norm_groups = norm_of_all_groups


def _sum_of_squares(gradients: list[Tensor], device: torch.device | str) -> Tensor:
    """0-d, in the dtype in which DeepSpeed takes norms (fp64 where the device has it)."""
    if not gradients:
        return torch.zeros((), dtype=get_norm_dtype(), device=device)
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=get_norm_dtype())).square().sum()
