"""Ranks as a user starts them: with the `deepspeed` launcher, whose own processes cost as much as the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dwt_ds.base.ports import reserve_port
from harness.ranks import SERVER_ENVIRONMENT

PROGRAMS = Path(sys.executable).parent


Launch = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """`launch(ranks, arguments)` runs `deepspeed --num_gpus RANKS --module dwt_ds.pretrain ARGUMENTS` on the CPU.

    Each rank has one thread. Returns the exit code and all output; a run that outlasts its time is killed with every
    process under it, and fails the test with the output so far.
    """

    def launch_ranks(
        ranks: int,
        arguments: Sequence[str],
        *,
        timeout_seconds: float = 240.0,
        environment: dict[str, str] | None = None,
        module: str = "dwt_ds.pretrain",
    ) -> tuple[int, str]:
        command = [sys.executable, str(PROGRAMS / "deepspeed"), "--log_level", "warning", "--num_gpus", str(ranks)]
        command += ["--master_port", str(reserve_port()), "--module", module, *arguments]
        return run_to_the_end(command, timeout_seconds, {**SERVER_ENVIRONMENT, **(environment or {})})

    return launch_ranks


def run_to_the_end(
    command: Sequence[str], timeout_seconds: float, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and output (both streams together) of a command; pytest's failure, and no process left, if it hangs."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
        text=True,
        errors="replace",
        start_new_session=True,  # so that ranks which have lost their launcher are found as well
    )
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout_seconds:.0f} s: {' '.join(command)}\n{output}")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output
