"""Spreads jobs over the GPUs of this machine, one process per GPU; with at most one GPU they run in this process.

torch is imported inside the functions: CUDA_VISIBLE_DEVICES of a worker must be set first.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any

from dwt_ds.base.gpus import gpu_count
from dwt_ds.base.processes import exit_with_parent


def visible_gpus() -> list[str]:
    """Values for CUDA_VISIBLE_DEVICES, one for each GPU; empty without any."""
    count = gpu_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


def spread(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], gpus: Sequence[str]
) -> Iterator[tuple[int, Any]]:
    """Call `function(*job)` for every job, one at a time on each GPU, and yield results as they come.

    Args:
        function: of a module's top level, so that other processes find it.
        jobs: its arguments; the first jobs start first.
        gpus: entries for CUDA_VISIBLE_DEVICES. With fewer than two all jobs run in this process.

    Yields:
        The job's index, and what the function returned or the exception that it raised.
    """
    if not jobs:
        return
    if len(gpus) < 2:
        share_cores(1)
        for index, job in enumerate(jobs):
            yield index, _outcome(partial(function, *job))
        return
    processes = min(len(gpus), len(jobs))
    context = multiprocessing.get_context("spawn")
    free: Any = context.Queue()
    for gpu in gpus[:processes]:
        free.put(gpu)
    executor = ProcessPoolExecutor(processes, context, _start_worker, (free, processes))
    try:
        futures = {executor.submit(function, *job): index for index, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], _outcome(future.result)
    finally:
        executor.shutdown(cancel_futures=True)


def share_cores(processes: int) -> None:
    """Limit the threads of this process to its share of the cores, with `processes` side by side."""
    import torch

    share = max(1, len(os.sched_getaffinity(0)) // processes)
    torch.set_num_threads(min(torch.get_num_threads(), share))


def _start_worker(free: Any, processes: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = free.get()
    from dwt_ds.base.quiet import quieten_libraries

    exit_with_parent()
    quieten_libraries()
    share_cores(processes)


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # a job that fails must not end the others
        return error
