"""The student's gradients under ZeRO, from the backward pass to the optimizer, with fewer operations than DeepSpeed's.

Under ZeRO-2 all gradients are in one flat buffer, if DeepSpeed's reduction bucket could hold them all. DeepSpeed 0.19.8
has a hook on each parameter: it copies the gradient into a bucket and, once that is full, reduces it over the ranks and
copies this rank's share out. On a GPU that keeps the host busy for longer than the model's own backward pass. If the
bucket holds all gradients, DeepSpeed reduces once, after the backward pass. Then the same is done here without the
copies: each `grad` is a view of one buffer, laid out as DeepSpeed lays out the weights, so that this rank's share is a
slice of it. The numbers stay the same: one reduction a micro-batch, the same division, the same sums in the same
dtypes.

One norm a step finds bad steps. DeepSpeed 0.19.8 checks every gradient for infinities and NaNs, and then takes the norm
of each. On a GPU every operation of these is a launch. The norm of all is enough: it is finite exactly if every
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

from dwt_ds.engine.checkpoint.weights import WITHOUT_ZERO, cut_like, held_masters
from dwt_ds.engine.ranks import HostCopy

# Added to the norm by DeepSpeed before it divides.
_EPSILON = 1e-6


class FlatGradients:
    """Replaces the gradient handling of DeepSpeed's ZeRO-2 optimizer.

    Args:
        optimizer: one that `can_be_flat` allows, before its first backward pass.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.buffers = [torch.zeros_like(weights) for weights in optimizer.bit16_groups_flat]
        """One for each group of parameters, in the weights' dtype and order."""
        self._sums: list[Tensor | None] = [None] * len(self.buffers)
        self.parameters: list[Tensor] = []
        """All that are trained."""
        self.views: list[Tensor] = []
        """Their gradients, in the same order: views of the buffers."""
        for flat, parameters, offsets in zip(
            self.buffers, optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
        ):
            for parameter, offset in zip(parameters, offsets):
                self.parameters.append(parameter)
                self.views.append(flat.narrow(0, offset, parameter.numel()).view(parameter.shape))
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        for parameter, view in zip(self.parameters, self.views):
            parameter.grad = view
        optimizer.overlapping_partition_gradients_reduce_epilogue = self._reduce
        optimizer.zero_grad = self._zero
        optimizer.free_grad_in_param_list = lambda parameters: None  # they stay views
        optimizer._update_model_bit16_weights = lambda group: None  # they are views of the flat weights already

    @torch.no_grad()
    def _reduce(self) -> None:
        """After the backward pass of a micro-batch: the mean over the ranks, of which this rank keeps its share."""
        optimizer = self._optimizer
        for group, flat in enumerate(self.buffers):
            ranks = comm.get_world_size(group=optimizer.dp_process_group)
            if not optimizer.reduce_scatter:
                optimizer.gradient_reduction_w_predivide(flat, flat.dtype)
            elif ranks > 1:
                if optimizer.gradient_average:
                    flat.div_(ranks)
                comm.all_reduce(flat, group=optimizer.dp_process_group)
            size = int(optimizer.partition_size[group])
            share = flat.narrow(0, comm.get_rank(group=optimizer.dp_process_group) * size, size)
            summed = self._sums[group]
            if summed is not None:
                share = summed.add_(share)
            if optimizer.is_gradient_accumulation_boundary():
                optimizer.averaged_gradients[group] = [share]
            else:
                self._sums[group] = share.clone() if summed is None else share
                flat.zero_()

    def _zero(self, set_to_none: bool = True) -> None:
        """After each optimizer step, taken or skipped."""
        torch._foreach_zero_(self.buffers)
        self._sums = [None] * len(self.buffers)


def cast_and_clip_at_once(optimizer: Any) -> None:
    """Compile the cast of 16-bit gradients to fp32 and their multiplication into one pass over memory.

    Args:
        optimizer: with `FlatGradients`, after `take_one_norm_a_step`.
    """
    compiled = torch.compile(lambda gradient, factor: gradient.float() * factor)

    def scaled_share(group: int) -> Tensor:
        [share] = optimizer.averaged_gradients[group]
        return compiled(share, torch.full((), optimizer.gradient_factor, device=share.device))

    optimizer._get_preflattened_grad_partition = scaled_share
    optimizer.unscale_and_clip_grads = lambda gradients, norm: None


def can_be_flat(optimizer: Any) -> bool:
    """Whether this optimizer's gradients may be in one buffer: plain ZeRO-2 whose bucket holds all of them.

    DeepSpeed's own handling stays for offloaded gradients, for sums or communication in another dtype, for a reduction
    to each owner, and for Muon, which updates whole matrices.
    """
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or not optimizer.partition_gradients:
        return False
    if optimizer.cpu_offload or _is_muon(optimizer):
        return False
    if optimizer.reduce_scatter and not optimizer.use_multi_rank_bucket_allreduce:
        return False
    dtypes = {optimizer.gradient_accumulation_dtype, optimizer.communication_data_type}
    dtypes |= {weights.dtype for weights in optimizer.bit16_groups_flat}
    in_one_bucket = sum(weights.numel() for weights in optimizer.bit16_groups_flat) <= optimizer.reduce_bucket_size
    return len(dtypes) == 1 and in_one_bucket


def take_one_norm_a_step(optimizer: Any) -> None:
    """Drop DeepSpeed's check of every gradient: one norm over all of them finds bad steps.

    It is one operation for all gradients. Nothing is changed where gradients are offloaded, and for Muon under ZeRO,
    where the norm is that of another update.

    Args:
        optimizer: of DeepSpeed's engine; without ZeRO in fp32 it checks nothing and is left alone. To be called before
            `correct_loss_scaling`, which wraps its `step`.
    """
    if isinstance(optimizer, WITHOUT_ZERO):
        optimizer.step = lambda closure=None: _step_without_zero(optimizer)
    elif _is_muon(optimizer):
        return
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        _under_zero_1_or_2(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.offload_optimizer:
        _under_zero_3(optimizer)


def _is_muon(optimizer: Any) -> bool:
    return "muon" in type(getattr(optimizer, "optimizer", None)).__name__.lower()


def _under_zero_1_or_2(optimizer: Any) -> None:
    """The norm is read once a step, and the gradients are clipped by the number that was read.

    While the host waits for it and then starts the update, a GPU would have nothing to do. So the caller may start
    other work first (`before_waiting_for_norm`).
    """
    optimizer.before_waiting_for_norm = lambda: None
    optimizer.has_overflow = lambda partition_gradients: False  # DeepSpeed's `step` sets it if the norm is not finite

    def scaled_global_norm(norm_type: int = 2) -> float:
        gradients = [
            gradient
            for group in range(len(optimizer.bit16_groups))
            for gradient in optimizer.averaged_gradients[group]
            if not getattr(gradient, "_zero_padding", False)
        ]
        squares = _sum_of_squares(gradients, optimizer.device)
        comm.all_reduce(squares, group=optimizer.dp_process_group)
        copy = HostCopy(squares)
        optimizer.before_waiting_for_norm()
        norm = math.sqrt(copy.number())
        optimizer.gradient_factor = _clip_factor(optimizer, norm)
        return norm

    def unscale_and_clip(gradients: Iterable[Tensor], norm: float) -> None:
        if optimizer.gradient_factor != 1.0:
            torch._foreach_mul_(list(gradients), optimizer.gradient_factor)

    optimizer.scaled_global_norm = scaled_global_norm
    optimizer.unscale_and_clip_grads = unscale_and_clip


def _clip_factor(optimizer: Any, norm: float) -> float:
    """What gradients are multiplied by before the update, for fp16's loss scale and for clipping.

    `norm` is theirs, loss scale included.
    """
    scale, limit = _loss_scale(optimizer), float(optimizer.clip_grad)
    if limit > 0:
        scale *= max((norm / scale + _EPSILON) / limit, 1.0)
    return 1.0 / scale


def _loss_scale(optimizer: Any) -> float:
    return float(optimizer.loss_scale or 1.0)  # None in bf16 without ZeRO, where the wrapped optimizer is fused


def _under_zero_3(optimizer: Any) -> None:
    optimizer.has_overflow = lambda partition_gradients: False  # as above

    def norm_of_all_groups() -> list[Tensor]:
        groups = range(len(optimizer.fp16_groups))
        gradients = [gradient for group in groups for gradient in optimizer.averaged_gradients[group]]
        squares = _sum_of_squares(gradients, optimizer.device)
        comm.all_reduce(squares, group=optimizer._get_param_partition_group(optimizer.fp16_groups[0][0]))
        return [squares.sqrt()]

    optimizer._get_norm_groups = norm_of_all_groups


@torch.no_grad()
def _step_without_zero(optimizer: Any) -> bool:
    """DeepSpeed's step with one operation for all tensors, where it has several for each; whether it was skipped."""
    parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    norm = math.sqrt(HostCopy(_sum_of_squares(gradients, parameters[0].device)).number())
    optimizer.overflow = not math.isfinite(norm)
    if optimizer.overflow:
        return bool(optimizer._skip_invalid_grad_norm())
    optimizer._global_grad_norm = norm / _loss_scale(optimizer)
    optimizer._update_scale(False)
    in_fp32, masters = [], []
    for group, held in zip(optimizer.fp16_groups, held_masters(optimizer)):
        empty = [torch.empty_like(master) for master in held]
        for master, gradient in zip(held, empty):
            master.grad = gradient
        in_fp32 += cut_like(group, empty)
        masters += cut_like(group, held)
    torch._foreach_copy_(in_fp32, gradients)
    torch._foreach_mul_(in_fp32, _clip_factor(optimizer, norm))
    optimizer.optimizer.step()
    torch._foreach_copy_(parameters, masters)
    optimizer.optimizer.zero_grad()
    return False


def _sum_of_squares(gradients: list[Tensor], device: torch.device | str) -> Tensor:
    """0-d, in the dtype in which DeepSpeed takes norms (fp64 where the device has it)."""
    if not gradients:
        return torch.zeros((), dtype=get_norm_dtype(), device=device)
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=get_norm_dtype())).square().sum()
