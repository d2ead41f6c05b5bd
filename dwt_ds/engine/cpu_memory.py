"""Keeps freed memory in the process, for training on a CPU.

glibc gives blocks of more than 32 MiB back to the kernel when they are freed and asks for them anew. Gradients and
optimizer temporaries are such blocks: every step would have all their pages zeroed and mapped again.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell the C library to take large blocks from the heap and never to shrink it; False where it cannot be told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
