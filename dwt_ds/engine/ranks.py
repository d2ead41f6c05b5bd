"""The ranks of a run: which one this process is, starting them, and what they do together."""

from __future__ import annotations

import ctypes
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import TorchBackend
from torch.distributed import distributed_c10d

from dwt_ds.base.words import one_line
from dwt_ds.engine.operator_builds import prepare_operator_builds
from dwt_ds.engine.rank_environment import fill_rank_environment, number_of_visible_device

_MEETING_SECONDS = 600.0
# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEEPSPEEDS_BARRIER = TorchBackend.barrier
# Public from torch 2.14 on, which warns of the former name.
_set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
# As the launcher set it; start_ranks may make LOCAL_RANK the number of a visible device.
_local_rank: int | None = None


class AllRanksError(RuntimeError):
    """A mistake that ends the run on every rank: all of them raise, none waits for another."""


class OtherRankError(AllRanksError):
    """Another rank found the mistake and prints it; this one only stops."""


def start_ranks(timeout_seconds: float = 1800.0) -> None:
    """Join the process group that the launcher's environment describes; alone, be a group of one.

    A collective that takes longer than `timeout_seconds` is an error on every rank that waits in it. At the start ranks
    wait for one another for 10 minutes at least, since one host may import or compile for longer than another.

    Raises:
        ValueError: there are several ranks, and no address to meet at, or they cannot meet there; or the GPUs asked
            for are not there.
        AllRanksError: some ranks have GPUs and others none, or two have the same one.
    """
    global _local_rank
    prepare_operator_builds()
    fill_rank_environment(os.environ)
    on_cuda = get_accelerator().device_name() == "cuda"
    if get_accelerator().device_name() == "cpu":
        _keep_freed_memory()
    # The last collectives are recorded: NCCL's group writes them to a file when one times out, stuck.py before that.
    for name, value in (("TORCH_FR_BUFFER_SIZE", "2000"), ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")):
        os.environ.setdefault(name, value)
    _local_rank = local_rank()
    if on_cuda:
        number_of_visible_device(os.environ, get_accelerator().device_count())
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    # Groups that ZeRO makes later would get torch's default of 10 or 30 minutes.
    limit = timedelta(seconds=timeout_seconds)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    meeting_limit = max(limit, timedelta(seconds=_MEETING_SECONDS))
    # Kept until the group is there, which meets at the same store.
    with _name_meeting_place():
        store, places = _meet_with_fitting_devices(get_accelerator().communication_backend_name(), meeting_limit)
    if "OMP_NUM_THREADS" not in os.environ:
        # Otherwise every rank starts a thread for each core that it may use, also where others use it.
        torch.set_num_threads(_threads(places[int(os.environ["RANK"])], places))
    with _name_meeting_place():
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            auto_mpi_discovery=False,
            timeout=meeting_limit,
            verbose=False,
        )
    del store
    _set_timeout(limit)
    if on_cuda:
        TorchBackend.barrier = _barrier_on_own_device


def stop_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank; before the group is started, the launcher's RANK, or 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank within its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _local_rank is None else _local_rank


def world_size() -> int:
    """Number of ranks, 1 before the group is started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The device this rank computes on."""
    return torch.device(get_accelerator().current_device_name())


def device_name() -> str:
    """What this rank computes on, in words."""
    return torch.cuda.get_device_name(device()) if device().type == "cuda" else "the CPU"


class HostCopy:
    """A 0-d tensor's value on its way to the host, which may do something else before it reads it."""

    def __init__(self, number: torch.Tensor) -> None:
        self._number = number.to("cpu", non_blocking=number.is_cuda)  # to pinned memory
        self._copied: torch.cuda.Event | None = None
        if number.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def number(self) -> float:
        """The value; waits for the work that it came from, and for no later work of the device."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._number)


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values`, of any shape, over all ranks; in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast_from_rank_0(value: Any) -> Any:
    """Rank 0's `value`, which can be anything that pickles, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def gather_from_ranks(value: Any) -> list[Any]:
    """The `value` of every rank, in the order of ranks, on every rank; anything that pickles."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Return once all ranks have called it."""
    gather_from_ranks(None)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Turn a ValueError, OSError or ImportError of any rank in the block into an error on every rank.

    The block must not communicate. The lowest rank that failed raises AllRanksError with its own message, the others
    OtherRankError.
    """
    own: Exception | None = None
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        own = error
    messages = gather_from_ranks(None if own is None else str(own))
    failed = next((r for r, message in enumerate(messages) if message is not None), None)
    if failed is None:
        return
    if failed == rank():
        raise AllRanksError(messages[failed]) from own
    raise OtherRankError(f"rank {failed}: {messages[failed]}")


class _Place(NamedTuple):
    """Where a rank computes."""

    backend: str
    host: str
    gpu: str
    """Its UUID; empty on a CPU, and for a rank that is alone."""
    cores: list[int]
    """That the rank may use: the host's, or those that a launcher bound it to."""


@contextmanager
def _name_meeting_place() -> Iterator[None]:
    """Turn torch's errors in the block, pages long, into a ValueError of one line."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        raise ValueError(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: the ranks cannot meet there ({one_line(error)}); the address "
            "must be rank 0's host, the port free there and reachable from all hosts, and every rank must start"
        ) from error


def _meet_with_fitting_devices(backend: str, limit: timedelta) -> tuple[Any, list[_Place]]:
    """The store at which the ranks of a run meet, None for one rank; and the place of each rank.

    Raises:
        AllRanksError: the devices of the ranks cannot work together.
    """
    place = _Place(backend, socket.gethostname(), "", sorted(os.sched_getaffinity(0)))
    if os.environ["WORLD_SIZE"] == "1":
        return None, [place]
    if get_accelerator().device_name() == "cuda":
        place = place._replace(gpu=str(torch.cuda.get_device_properties(int(os.environ["LOCAL_RANK"])).uuid))
    store, number, size = next(dist.rendezvous("env://", timeout=limit))
    own, left = ([f"dwt_ds/{what}/{each}" for each in range(size)] for what in ("place", "left"))
    store.set(own[number], json.dumps(place))
    places = [_Place(*json.loads(value)) for value in store.multi_get(own)]
    message = _what_does_not_fit(places)
    if message is not None:
        store.set(left[number], "")
        if number > 0:
            raise OtherRankError(message)
        store.multi_get(left)  # the store is in this process: it stays until no other rank reads from it
        raise AllRanksError(message)
    return store, places


def _threads(place: _Place, places: list[_Place]) -> int:
    """A rank's threads on a CPU: its cores, divided by the ranks that may use them too.

    srun and mpirun can bind each rank to cores of its own.
    """
    sharing = sum(each.host == place.host and not set(each.cores).isdisjoint(place.cores) for each in places)
    return max(1, len(place.cores) // sharing)


def _what_does_not_fit(places: list[_Place]) -> str | None:
    """What is wrong with the ranks' devices.

    A host whose GPUs torch does not see would make a group of gloo, the others one of NCCL, and all would wait for one
    another until the time limit. Two ranks with one GPU would end in NCCL, at the first collective.
    """
    hosts = {each.backend: each.host for each in reversed(places)}
    if len(hosts) > 1:
        each = ", ".join(f"{backend} on {host}" for backend, host in sorted(hosts.items()))
        return (
            f"ranks on different devices: {each}; gloo means that torch sees no GPU there: see what nvidia-smi lists "
            "and what CUDA_VISIBLE_DEVICES is, leave the host out, or set DS_ACCELERATOR=cpu on all hosts"
        )
    for _, host, gpu, _ in places:
        same = [number for number, each in enumerate(places) if (each.host, each.gpu) == (host, gpu)]
        if gpu and len(same) > 1:
            there = [each.gpu for each in places if each.host == host]
            return (
                f"ranks {' and '.join(map(str, same))} have the same GPU: the {len(there)} ranks on {host} see "
                f"{len(set(there))} GPU(s); start as many ranks as GPUs there, with --num_gpus or slots= in the "
                "hostfile, or see what CUDA_VISIBLE_DEVICES is"
            )
    return None


def _barrier_on_own_device(backend: Any, device_ids: list[int] | None = None, **others: Any) -> Any:
    """DeepSpeed's barrier, with this rank's device named.

    DeepSpeed 0.19.8 names none, and binds no device to a group of one rank, which NCCL cannot split (DeepSpeed #8248).
    NCCL would then guess the device by the global rank, and torch would warn of that at the end of a run.
    """
    return _DEEPSPEEDS_BARRIER(backend, device_ids=device_ids or [get_accelerator().current_device()], **others)


def _keep_freed_memory() -> None:
    """Make glibc take large blocks from the heap and never shrink it.

    By default it returns blocks of more than 32 MiB to the kernel when they are freed. On a CPU, gradients and
    optimizer temporaries are such blocks: the kernel would zero and map all their pages again in every step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
