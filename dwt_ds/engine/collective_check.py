"""A timed all-reduce over all ranks of a launch; `dwt-ds doctor` starts it with DeepSpeed's launcher.

deepspeed --num_gpus 2 --module dwt_ds.engine.collective_check      rank 0 prints one line of JSON
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
import torch.distributed as dist

from dwt_ds.base.software import host_name
from dwt_ds.engine import COLLECTIVE_ANSWER, ranks
from dwt_ds.engine.student import quieten_deepspeed

# Before they meet, hosts may have to compile operators.
_TIMEOUT_SECONDS = 600.0
_ROUNDS = 5


def all_reduce_seconds(device: torch.device, elements: int) -> float:
    """Median time of an all-reduce of `elements` fp32 numbers; RuntimeError on a rank where the sum is wrong."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        values = torch.full((elements,), float(ranks.rank() + 1), device=device)
        # NCCL's own barrier may choose another device than this rank's before the first collective.
        ranks.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        total = float(values[-1])  # waits for the device
        seconds.append(time.perf_counter() - began)
        expected = ranks.world_size() * (ranks.world_size() + 1) / 2
        if total != expected or not bool((values == total).all()):
            raise RuntimeError(f"rank {ranks.rank()} on {host_name()}: the sum over ranks is {total}, not {expected}")
    return statistics.median(seconds[1:])


def main() -> int:
    quieten_deepspeed()
    ranks.start_ranks(_TIMEOUT_SECONDS)
    device = ranks.device()
    elements = (4 if device.type == "cpu" else 64) * 2**20
    seconds = all_reduce_seconds(device, elements)
    latency = all_reduce_seconds(device, 1)
    hosts = ranks.gather_from_ranks(host_name())
    if ranks.rank() == 0:
        size = ranks.world_size()
        answer = {
            "ranks": size,
            "hosts": list(dict.fromkeys(hosts)),
            "bytes": elements * 4,
            "seconds": seconds,
            "latency_seconds": latency,
            # Bytes that a ring moves over each rank's link; NCCL's tests call the rate bus bandwidth.
            "bus_bytes_per_second": elements * 4 * 2 * (size - 1) / size / seconds,
        }
        print(f"{COLLECTIVE_ANSWER}{json.dumps(answer)}", flush=True)
    ranks.stop_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
