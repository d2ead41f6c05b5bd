"""Ranks without the seconds that each would need for its imports.

A server, started once for a session, imports torch, Transformers, DeepSpeed and dwt_ds; every rank is a fork of it.
A rank runs what `python WORDS` would run ("-m MODULE ...", "-c CODE ..." or "FILE ..."), as `__main__`, in exactly the
environment that it is given. Three things differ from `python WORDS`:

* The environment of the server holds for what libraries read when they are imported: see SERVER_ENVIRONMENT.
* All ranks have one seed of Python's hashes, as with PYTHONHASHSEED.
* The process ends without tearing down the interpreter.

A test that depends on one of them, or on the launcher, takes launcher.py. What the server loads (warm.py) must not
start threads or run anything in parallel, since a fork has one thread only: test_ranks.py holds it to that.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from dwt_ds.base.ports import reserve_port

TESTS = Path(__file__).parents[1]
# For the CPU, with one thread; without the network.
SERVER_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

OTHERS_SECONDS = 30.0
"""How long the other ranks may still run when one has failed."""
OUTLIVED = "killed by the harness because it outlived a failed rank: rank"


class Ended(NamedTuple):
    """How a process ended; the code is negative for a signal."""

    code: int
    out: str
    err: str


class Processes:
    """Forks of the server, each with its words and its whole environment."""

    def __init__(
        self, commands: Sequence[tuple[Sequence[str], dict[str, str]]], folder: Path, cwd: Path | None = None
    ) -> None:
        self._folder = folder
        self._outlived: list[int] = []
        self.processes = []
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        # The first one of a session starts the server.
        with patch.dict(os.environ, {**SERVER_ENVIRONMENT, "PYTHONPATH": path}):
            for number, (words, environment) in enumerate(commands):
                ignores_hangups = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
                arguments = (list(words), environment, cwd, str(folder / f"rank_{number}"), ignores_hangups)
                process = _SERVER.Process(target=_become, args=arguments)
                process.start()
                self.processes.append(process)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float) -> list[Ended]:
        """How each ended; pytest's failure if that takes longer. Ranks that outlive a failed one are killed."""
        give_up = time.monotonic() + seconds
        failed = False
        try:
            while left := [process.sentinel for process in self.processes if process.is_alive()]:
                wait(left, timeout=give_up - time.monotonic())
                if time.monotonic() >= give_up and self.running():
                    if failed:
                        self._outlived = [rank for rank, each in enumerate(self.processes) if each.is_alive()]
                        break
                    self.kill()
                    pytest.fail(f"still running after {seconds:.0f} s\n{self.output()}")
                if not failed and any(process.exitcode for process in self.processes):
                    failed, give_up = True, min(give_up, time.monotonic() + OTHERS_SECONDS)
        finally:
            self.kill()
        return [Ended(p.exitcode or 0, *self._streams(rank)) for rank, p in enumerate(self.processes)]

    def output(self) -> str:
        """Both streams of all ranks so far, one after another; a line for each that had to be killed."""
        texts = [text for rank in range(len(self.processes)) for text in self._streams(rank)]
        return "".join([*texts, *(f"{OUTLIVED} {rank}\n" for rank in self._outlived)])

    def _streams(self, rank: int) -> tuple[str, str]:
        paths = (self._folder / f"rank_{rank}.{name}" for name in ("out", "err"))
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in paths)
        return out, err


Python = Callable[..., Ended]
Start = Callable[..., Processes]
Run = Callable[..., list[Ended]]
Train = Callable[..., tuple[int, str]]


def ranks_of(
    words: Sequence[Sequence[str]], environment: dict[str, str] | None = None, own: Sequence[dict[str, str]] = ()
) -> list[tuple[Sequence[str], dict[str, str]]]:
    """The commands of a rank for each of `words`, with variables for all and, by rank, of their own."""
    size = len(words)
    together = {**os.environ, **SERVER_ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_port())}
    together |= {"WORLD_SIZE": str(size), "LOCAL_SIZE": str(size), **(environment or {})}
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return [(line, together | number | mine) for line, number, mine in zip(words, numbers, own or [{}] * size)]


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """`python(*words)`: how one process that is no rank ends."""

    def run(*words: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> Ended:
        variables = {**os.environ, **SERVER_ENVIRONMENT, **(environment or {})}
        [ended] = Processes([(words, variables)], tmp_path_factory.mktemp("python"), cwd).wait(300)
        return ended

    return run


@pytest.fixture
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """`start_ranks(words, ...)` starts a rank for each of `words`; what still runs when the test ends is killed."""
    started: list[Processes] = []

    def start(words: Sequence[Sequence[str]], **variables: Any) -> Processes:
        started.append(Processes(ranks_of(words, **variables), tmp_path_factory.mktemp("ranks")))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run_ranks(words, ...)`: how a rank for each of `words` ends."""

    def run(words: Sequence[Sequence[str]], seconds: float = 240.0, **variables: Any) -> list[Ended]:
        return Processes(ranks_of(words, **variables), tmp_path_factory.mktemp("ranks")).wait(seconds)

    return run


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`train(ranks, arguments)` runs so many ranks of `dwt_ds.pretrain`; exit code of the first that failed, output.

    `program` are other words for `python` than "-m dwt_ds.pretrain".
    """

    def train_ranks(
        ranks: int,
        arguments: Sequence[str],
        *,
        environment: dict[str, str] | None = None,
        program: Sequence[str] = ("-m", "dwt_ds.pretrain"),
        seconds: float = 240.0,
    ) -> tuple[int, str]:
        commands = ranks_of([[*program, *arguments]] * ranks, environment)
        started = Processes(commands, tmp_path_factory.mktemp("ranks"))
        ended = started.wait(seconds)
        return next((rank.code for rank in ended if rank.code), 0), started.output()

    return train_ranks


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["harness.warm"])


def _become(
    words: list[str], environment: dict[str, str], cwd: Path | None, output: str, ignores_hangups: bool
) -> None:
    """In the fork: `python WORDS`, with the streams in files. Like any child of the test's process, it ignores SIGHUP
    if that does; the server may have been started under nohup, and the test may have undone it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores_hangups else signal.SIG_DFL)
    for number, name in ((1, "out"), (2, "err")):
        stream = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    if cwd:
        os.chdir(cwd)
    # Processes that the rank starts are not this server's.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
