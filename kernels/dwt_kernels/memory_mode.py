"""How the linear form holds logits: chunks of which size, or none at all."""

from __future__ import annotations

import torch

from dwt_kernels.head import Head

# Both logit buffers of a chunk together. Large, because every chunk reads and writes the fp32 dW (8 V H bytes). At
# 4.8 TB/s and 700 TFLOP/s that takes 8% of the time of the products of 2,048 rows, which for V = 128,256 in 16 bits are
# 1.05 GB, as much as the fp32 dW at H = 2,048. On a CPU (0.8 TFLOP/s) it takes 4% at 1,000 rows, which for V = 30,522
# are 122 MB.
GPU_CHUNK_BYTES = 1 << 30
CPU_CHUNK_BYTES = 1 << 29

# Logits that are no matter on any GPU: its free memory, whose query takes longer than small products, is not asked for.
SMALL_BYTES = 1 << 28

# The logits' share of the free memory of a GPU: gradients, and whatever the backward pass wants, need the rest.
FREE_MEMORY_SHARE = 0.25

# Below this many rows the chunks' products no longer fill a GPU, and recomputing tiles is the better use of it.
SMALLEST_CHUNK_ROWS = 256


def resolve_chunk_rows(
    memory: str, chunk_rows: int | None, backend: str, student: Head, teacher: Head | None
) -> int | None:
    """Rows in a chunk, all chunks nearly equal; None for logit-free.

    Depends on the shapes alone, except on a GPU with less than 4 GiB free.
    """
    if memory == "logit_free":
        return None
    rows = student.hidden.shape[0]
    if chunk_rows is None:
        element_bytes = sum(head.hidden.element_size() for head in (student, teacher) if head is not None)
        row_bytes = student.weight.shape[0] * element_bytes
        small = rows * row_bytes <= SMALL_BYTES
        chunk_rows = max(1, rows if small else chunk_bytes(student.hidden.device) // row_bytes)
        too_small = chunk_rows < min(rows, SMALLEST_CHUNK_ROWS)
        if memory == "auto" and backend == "triton" and too_small and not torch.are_deterministic_algorithms_enabled():
            return None
    chunks = max(1, -(-rows // chunk_rows))
    return max(1, -(-rows // chunks))


def chunk_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_CHUNK_BYTES
    if torch.cuda.is_current_stream_capturing():
        return GPU_CHUNK_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(GPU_CHUNK_BYTES, int((free + cached) * FREE_MEMORY_SHARE))
