"""Arithmetic in fp32 on whole tensors of 16 bits, block by block, so that no fp32 copy of the whole is made."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of an fp32 temporary. On a CPU one that stays in a core's L2 cache: torch's mixed-dtype arithmetic over whole
# tensors is several times slower there than a conversion and an fp32 operation block by block. On a GPU 64 MiB, a tenth
# of a millisecond's work, so that a whole dW is not held in fp32 beside the one in 16 bits.
CPU_BLOCK_ELEMENTS = 1 << 17
GPU_BLOCK_ELEMENTS = 1 << 24

# Rows of a product on a CPU whose operand is converted: enough for the product's rate.
PRODUCT_ROWS = 1 << 10


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


def add_in_blocks(total: Tensor, addend: Tensor) -> Tensor:
    for out, block in zip(blocks(total), blocks(addend)):
        out += block.float()
    return total


def add_product_in_blocks(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right of 16-bit operands, multiplied and summed in fp32."""
    right = right.float()
    for out, block in zip(total.split(PRODUCT_ROWS), left.split(PRODUCT_ROWS)):
        out.addmm_(block.float(), right)
    return total


def add_column_sums_in_blocks(total: Tensor, matrix: Tensor) -> Tensor:
    for block in blocks(matrix):
        total += block.float().sum(0)
    return total


def blocks(tensor: Tensor) -> list[Tensor]:
    """Blocks of rows, at least one row each, of at most CPU_BLOCK_ELEMENTS or GPU_BLOCK_ELEMENTS."""
    if tensor.numel() == 0:
        return [tensor]
    elements = CPU_BLOCK_ELEMENTS if tensor.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    return list(tensor.split(max(1, elements * tensor.shape[0] // tensor.numel())))
