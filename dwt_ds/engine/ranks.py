"""The ranks of a run: starting them, and the few things they tell each other."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from dwt_ds.engine.build_locks import end_waits_for_killed_builds
from dwt_ds.engine.cpu_memory import forget_shared_buffer, keep_freed_memory
from dwt_ds.engine.rank_environment import fill_rank_environment


class AllRanksError(RuntimeError):
    """A mistake that ends the run, and of which every rank knows: none waits for another."""


class OtherRankError(AllRanksError):
    """Another rank found the mistake and says what it is; this one only stops."""


def start_ranks(timeout_seconds: float = 1800.0) -> None:
    """Join the process group that the launcher's environment describes; alone, be a group of one.

    A collective that takes longer than `timeout_seconds` is an error on every rank that waits in it. Raises ValueError
    where a launcher left out what the ranks need to find each other.
    """
    # DeepSpeed compiles operators at first use, and anew whenever another ninja than last time looks at them.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    fill_rank_environment(os.environ)
    if "OMP_NUM_THREADS" not in os.environ:
        # Otherwise every rank starts a thread for each core of the machine.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_SIZE"])))
    if get_accelerator().device_name() == "cpu":
        keep_freed_memory()
    # What every collective did last is kept: NCCL's group writes it down when one times out, stuck.py before that.
    for name, value in (("TORCH_FR_BUFFER_SIZE", "2000"), ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")):
        os.environ.setdefault(name, value)
    get_accelerator().set_device(local_rank())
    # Groups that are made later, as ZeRO makes some, would get torch's own 10 or 30 minutes.
    limit = timedelta(seconds=timeout_seconds)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    end_waits_for_killed_builds(several_hosts=os.environ["LOCAL_SIZE"] != os.environ["WORLD_SIZE"])
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of every operator it has
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            auto_mpi_discovery=False,
            timeout=limit,
            verbose=False,
        )
    if get_accelerator().device_name() == "cpu":
        dist.barrier()
        forget_shared_buffer(rank())


def stop_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank, 0 before the group is there."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank within its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The device this rank computes on."""
    return torch.device(get_accelerator().current_device_name())


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast_from_rank_0(value: Any) -> Any:
    """Rank 0's `value` on every rank; anything that pickles, from our own processes only."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def gather_from_ranks(value: Any) -> list[Any]:
    """Every rank's `value`, by rank."""
    boxes: list[Any] = [None] * world_size()
    if world_size() == 1:
        return [value]
    dist.all_gather_object(boxes, value)
    return boxes


def barrier() -> None:
    """Return once all ranks have come here. After a broadcast its source may go on before anybody has received it."""
    gather_from_ranks(None)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Within the block a mistake on any rank becomes an error on every rank, so that none waits for another.

    The block itself must not communicate. The first rank that failed raises AllRanksError with its own message, the
    others OtherRankError with the same.
    """
    own: Exception | None = None
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        own = error
    failures = [(r, m) for r, m in enumerate(gather_from_ranks(str(own) if own else None)) if m is not None]
    if not failures:
        return
    if own is not None and failures[0][0] == rank():
        raise AllRanksError(str(own)) from own
    raise OtherRankError(f"rank {failures[0][0]}: {failures[0][1]}")
