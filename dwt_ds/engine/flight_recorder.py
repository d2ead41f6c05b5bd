"""What torch's process groups remember of their collectives."""

from __future__ import annotations

import json

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch._C import _distributed_c10d


def recorded_collectives() -> str:
    """This rank's last collectives with their stacks, as JSON; empty where torch keeps no record of them.

    NCCL's group writes its record by itself when a collective times out; gloo's never does.
    """
    recorder = "_dump_nccl_trace_json" if dist.get_backend() == "nccl" else "_dump_fr_trace_json"
    dump = getattr(_distributed_c10d, recorder, None)
    if dump is None:
        return ""
    recorded = dump()
    return recorded if isinstance(recorded, str) else bytes(recorded).decode()


def collectives_begun(recorded: str) -> int:
    """How many collectives this rank has begun since its start, over all of its groups."""
    # Before the first collective there is no such key.
    entries = json.loads(recorded).get("entries", []) if recorded else []
    return max((int(entry["record_id"]) + 1 for entry in entries), default=0)


def collectives_block() -> bool:
    """Whether a thread that has called a collective stays in it until it is over, as on a CPU."""
    return bool(get_accelerator().device_name() == "cpu")
