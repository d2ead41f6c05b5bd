"""The student's gradients in one flat buffer, under ZeRO-2, where a rank has room for them all.

DeepSpeed 0.19.8 has a hook on each parameter: it copies the gradient into a bucket and, once that is full, reduces it
over the ranks and copies this rank's share out. On a GPU that keeps the host busy for longer than the model's own
backward pass. If the bucket holds all gradients, DeepSpeed reduces once, after the backward pass. Then the same is done
here without the copies: each `grad` is a view of one buffer, laid out as DeepSpeed lays out the weights, so that this
rank's share is a slice of it.

The numbers stay the same: one reduction a micro-batch, the same division, the same sums in the same dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


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


def can_be_flat(optimizer: Any) -> bool:
    """Whether this optimizer's gradients may be in one buffer: plain ZeRO-2 whose bucket holds all of them.

    DeepSpeed's own handling stays for offloaded gradients, for sums or communication in another dtype, for a reduction
    to each owner, and for Muon, which updates whole matrices.
    """
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or not optimizer.partition_gradients:
        return False
    if optimizer.cpu_offload or optimizer.zenflow or optimizer.has_moe_layers or optimizer.sequence_parallel_size > 1:
        return False
    if optimizer.reduce_scatter and not optimizer.use_multi_rank_bucket_allreduce:
        return False
    if "muon" in type(optimizer.optimizer).__name__.lower():
        return False
    dtypes = {optimizer.gradient_accumulation_dtype, optimizer.communication_data_type}
    dtypes |= {weights.dtype for weights in optimizer.bit16_groups_flat}
    in_one_bucket = sum(weights.numel() for weights in optimizer.bit16_groups_flat) <= optimizer.reduce_bucket_size
    return len(dtypes) == 1 and in_one_bucket
