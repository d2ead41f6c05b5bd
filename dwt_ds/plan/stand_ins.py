"""Stand-ins on the meta device for what does not run there: fused attention, a GPU's dropout, the loss kernel.

Each allocates and keeps tensors of the same shapes and dtypes as the real one, so that their bytes are counted. What
fused attention fills with zeros counts as an operation: one forward, three backward.
"""

from __future__ import annotations

from typing import Any

import torch
from dwt_kernels.layout import STATISTICS
from dwt_kernels.linear_chunked import CPU_CHUNK_BYTES, GPU_CHUNK_BYTES, automatic_chunk_rows, saved_dtype
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from dwt_ds.models.dropout import use_cpu_dropout

FUSED_ATTENTION = "dwt_plan_fused"


def imitate_device(model: PreTrainedModel, attention: str, *, on_cpu: bool) -> None:
    """Give a meta model the attention and dropout that it would have on a CPU or a GPU; in place.

    Args:
        model: on the meta device, with eager attention.
        attention: the recipe's `student.attention`; auto is eager on a CPU and fused on a GPU, as in a run.
    """
    if on_cpu:
        use_cpu_dropout(model)
        return
    fused = attention != "eager" and type(model)._supports_sdpa
    model.set_attn_implementation(FUSED_ATTENTION if fused else "eager")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, _GpuDropout(module.p))


class _GpuDropout(nn.Dropout):
    """A GPU keeps one byte per element for the backward pass; torch's meta device would keep a whole element."""

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return hidden
        return torch.native_dropout(hidden, self.p, True)[0]


class _FusedAttention(torch.autograd.Function):
    """FlashAttention-2 (Dao 2023) keeps inputs, output and one number per row, but no (S, S) scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, size = query.shape
        out = query.new_zeros(batch, length, heads, size).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, row_numbers = ctx.saved_tensors
        sums = (torch.empty_like(row_numbers), query.new_empty(query.shape, dtype=torch.float32))
        results = tuple(torch.zeros_like(each) for each in (query, key, value))
        del sums
        return results


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_kwargs: object
) -> tuple[Tensor, None]:
    """query, key, value (B, heads, S, d); returns (B, S, heads, d)."""
    out: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED_ATTENTION, _fused_attention)
AttentionMaskInterface.register(FUSED_ATTENTION, sdpa_mask)


def chunk_rows(rows: int, row_bytes: int, *, memory: str, on_cpu: bool) -> int | None:
    """Rows whose logits are in memory at once, of both models (`row_bytes` per row); None: none are (logit-free).

    As `dwt_kernels` chooses on a device with 4 GiB free or more.
    """
    if memory == "logit_free":
        return None
    most_bytes = CPU_CHUNK_BYTES if on_cpu else GPU_CHUNK_BYTES
    return automatic_chunk_rows(rows, row_bytes, most_bytes, memory == "auto" and not on_cpu)


class Loss(torch.autograd.Function):
    """The bytes of `dwt_kernels.linear_distill_loss`: logits in chunks, and gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: tuple[Tensor, Tensor] | None,
        rows_at_once: int | None,
    ) -> Tensor:
        """hidden (N, H), weight (V, H), bias (V,); teacher's hidden (N, H_t) and weight; returns a 0-d fp32 tensor."""
        rows = hidden.shape[0]
        one_chunk = rows_at_once is not None and rows_at_once >= rows
        statistics = hidden.new_empty(rows, STATISTICS, dtype=torch.float32)
        logits = []
        if rows_at_once is not None:
            logits = [
                each.new_empty(rows_at_once, w.shape[0]) for each, w in ((hidden, weight), *filter(None, [teacher]))
            ]
        saved = [torch.empty_like(hidden)]
        in_16_bits = one_chunk and weight.dtype == torch.bfloat16  # else dW is summed in fp32
        sums = weight.new_empty(weight.shape, dtype=weight.dtype if in_16_bits else torch.float32)
        for tensor in (weight, bias):
            if tensor is None:
                continue
            dtype = saved_dtype(tensor)
            reuse = tensor is weight and dtype == sums.dtype
            saved.append(sums if reuse else tensor.new_empty(tensor.shape, dtype=dtype))
        del sums, logits, statistics
        ctx.save_for_backward(*saved)
        ctx.inputs = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [torch.empty_like(each, dtype=dtype) for each, dtype in zip(ctx.saved_tensors, ctx.inputs)]
        return (*gradients, *[None] * (5 - len(gradients)))
