"""The linear head's products and gradient sums: which dtype is accumulated where, and how it is scaled afterwards.

A product of 16-bit inputs is summed in fp32 inside the matrix multiplication. On a GPU it also leaves it in fp32 and
is added to an fp32 total in the multiplication's epilogue. On a CPU torch can only return it in 16 bits; with one chunk
that is the single rounding the gradient needs anyway, with more each chunk's share is rounded once and added in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of an fp32 temporary. On a CPU one that stays in a core's L2 cache: torch's mixed-dtype arithmetic over whole
# tensors is several times slower there than a conversion and an fp32 operation block by block. On a GPU 64 MiB, a tenth
# of a millisecond's work, so that a whole dW is not held in fp32 beside the one in 16 bits.
CPU_BLOCK_ELEMENTS = 1 << 17
GPU_BLOCK_ELEMENTS = 1 << 24


def saved_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype a head's gradient waits in for the backward pass: bf16 has fp32's range, fp16 would overflow."""
    return parameter.dtype if parameter.dtype == torch.bfloat16 else torch.float32


def add_product(total: Tensor | None, left: Tensor, right: Tensor, last: bool) -> Tensor:
    """total + left @ right; fp32, or the inputs' dtype when this is the first and ``last`` contribution on a CPU."""
    if left.dtype == torch.float32:
        return torch.mm(left, right) if total is None else total.addmm_(left, right)
    if left.device.type != "cpu":
        if total is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    product = torch.mm(left, right)
    if total is None:
        return product if last else product.float()
    return add_in_blocks(total, product)


def add_column_sums(total: Tensor | None, gradient: Tensor) -> Tensor:
    """total + the sum over the rows of ``gradient`` (n, V); fp64."""
    if gradient.device.type == "cpu" and gradient.dtype != torch.float32:
        # A product with ones: torch's own sum over rows takes ten times as long in 16 bits on a CPU.
        sums = torch.mm(gradient.new_ones(1, gradient.shape[0]), gradient).squeeze(0)
    else:
        sums = gradient.sum(0, dtype=torch.float32)
    return sums.double() if total is None else total.add_(sums)


def add_in_blocks(total: Tensor, addend: Tensor) -> Tensor:
    for out, block in zip(blocks(total), blocks(addend)):
        out += block.float()
    return total


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor x factor (0-d fp32), multiplied in fp32 and rounded once; always new memory."""
    out = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    if tensor.dtype == dtype == torch.float32:
        return torch.mul(tensor, factor, out=out)
    if tensor.dtype == dtype and tensor.device.type == "cpu":
        # By a number, torch multiplies 16-bit tensors in fp32 and in one pass: eight times as fast as by blocks.
        return torch.mul(tensor, factor.item(), out=out)
    for target, block in zip(blocks(out), blocks(tensor)):
        # A copy even of fp32, which .float() would return itself: ``tensor`` is saved for another backward pass.
        target.copy_(block.to(torch.float32, copy=True).mul_(factor))
    return out


def blocks(tensor: Tensor) -> list[Tensor]:
    """Blocks of rows, at least one row each, of at most CPU_BLOCK_ELEMENTS or GPU_BLOCK_ELEMENTS."""
    if tensor.numel() == 0:
        return [tensor]
    elements = CPU_BLOCK_ELEMENTS if tensor.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    return list(tensor.split(max(1, elements * tensor.shape[0] // tensor.numel())))
