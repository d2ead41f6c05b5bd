"""Memory of ranks that train on a CPU: freed memory stays in the process, shared memory does not outlive it.

glibc gives blocks of more than 32 MiB back to the kernel when they are freed and asks for them anew. Gradients and
optimizer temporaries are such blocks: every step would have all their pages zeroed and mapped again.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Tell the C library to take large blocks from the heap and never to shrink it, where it can be told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def forget_shared_buffer(rank: int) -> None:
    """Remove the name of this rank's buffer in /dev/shm; to be called once all ranks have it open.

    DeepSpeed's shared-memory all-reduce makes a file of 66 MiB a rank and leaves it behind at the end: memory that no
    process has any more, until the machine has none. Without a name it goes with the last process that maps it, however
    that process ends.
    """
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)
