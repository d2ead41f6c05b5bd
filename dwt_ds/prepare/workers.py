"""Work spread over processes, with results in the order of the items, whatever the number of workers."""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import TypeVar

from dwt_ds.base.processes import exit_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """function(item) for each item, in order; `function` and items must pickle.

    At most two items per worker are in progress, so memory does not grow with the number of items. With one worker,
    everything runs in this process. Raises ChildProcessError if a worker was killed, for instance out of memory, or if
    none can be started.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    try:
        # Not fork: this process may have threads (tokenizers, Arrow), whose locks a forked child would inherit.
        executor = ProcessPoolExecutor(workers, mp_context=_Workers(), initializer=_start_worker)
    except OSError as error:  # its semaphores are files in /dev/shm
        raise ChildProcessError(
            f"--workers {workers}: worker processes cannot be started ({error}); make room in /dev/shm, or give "
            "--workers 1"
        ) from error
    with executor as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ChildProcessError(
                f"a worker process was killed (out of memory?); try fewer than {workers} workers (--workers)"
            ) from None
        except BaseException:
            # Leaving the pool would wait for the workers. Killing them is safe: they write files atomically.
            for process in list(pool._processes.values()):
                process.kill()
            raise


class _Worker(SpawnProcess):
    """A spawned process that does not import the main script, of which it needs nothing.

    A script that calls `dwt_ds.prepare` would otherwise run again in each worker.
    """

    def start(self) -> None:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = script


class _Workers(SpawnContext):
    Process = _Worker


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and ends its workers
    exit_with_parent()
