"""One run of a study, by the deepspeed launcher, as a user would start it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dwt_ds.launch.local import launcher_options

PROGRAMS = Path(sys.executable).parent


def pretrain_command(recipe: Path, overrides: Sequence[str], ranks: int) -> list[str]:
    """What starts the run of a recipe, supervised so that its exit code can be believed."""
    arguments = [str(recipe), *overrides]
    supervised = [sys.executable, "-m", "dwt_ds.launch.supervise", *arguments, "--"]
    launcher = [str(PROGRAMS / "deepspeed"), *launcher_options(ranks)]
    return [*supervised, *launcher, "--module", "dwt_ds.pretrain", *arguments]


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
