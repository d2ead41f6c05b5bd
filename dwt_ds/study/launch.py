"""One run of a study, by the deepspeed launcher, as a user would start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

PROGRAMS = Path(sys.executable).parent


def visible_ranks(without_gpu: int) -> int:
    """Processes of a run: one a GPU, or `without_gpu`."""
    return torch.cuda.device_count() if torch.cuda.is_available() else without_gpu


def pretrain_command(recipe: Path, overrides: Sequence[str], ranks: int) -> list[str]:
    """What starts the run of a recipe, supervised so that its exit code can be believed."""
    launcher = ["deepspeed", "--log_level", "warning", "--num_gpus", str(ranks), "--master_port", str(_free_port())]
    arguments = [str(recipe), *overrides]
    supervised = [sys.executable, "-m", "dwt_ds.supervise", *arguments, "--"]
    return [*supervised, str(PROGRAMS / launcher[0]), *launcher[1:], "--module", "dwt_ds.pretrain", *arguments]


def run_logged(command: Sequence[str], log: Path) -> int:
    """Run `command` with its output appended to `log`; its exit code.

    A Ctrl-C or SIGTERM is passed on and waited for, and then raised here as KeyboardInterrupt.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = f"{PROGRAMS}{os.pathsep}{os.environ.get('PATH', '')}"
    # Without it DeepSpeed's launcher warns on machines without a GPU that it found none.
    accelerator = {} if torch.accelerator.is_available() else {"DS_ACCELERATOR": "cpu"}
    with open(log, "a", encoding="utf-8") as output:
        process = subprocess.Popen(
            list(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PATH": path, **accelerator},
            start_new_session=True,  # so that a Ctrl-C in the terminal comes here alone
        )
        former = signal.signal(signal.SIGTERM, _interrupt)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, former)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
