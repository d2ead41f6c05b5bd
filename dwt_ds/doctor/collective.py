"""A timed collective over all ranks, started as a run is."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from dwt_ds.base.software import package_folder
from dwt_ds.doctor.commands import run
from dwt_ds.launch.doctor_launch import Launch

# As dwt_ds/engine/collective_check.py prints it; only the engine's room imports DeepSpeed.
_ANSWER = "dwt-ds collective: "
_MODULE = "dwt_ds.engine.collective_check"
_SECONDS = 1200.0


def time_collective(launch: Launch | None, gpus: int) -> dict[str, Any]:
    """What rank 0 measured, or {"problem": ...} with the last telling line of the start.

    None is this machine alone, with its `gpus` as torch counts them, or two CPU ranks.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    program, variables = ["--module", _MODULE], {}
    if launch is None:
        command += _here(gpus, os.environ)
    else:
        command += launch.options
        variables = launch.variables
        if not launch.takes_modules:
            program = [str(package_folder("dwt_ds") / "engine" / "collective_check.py")]
    code, out, err = run([*command, *program], _SECONDS, variables)
    for line in out.splitlines():
        # pdsh puts the host's name before each line.
        _, found, answer = line.partition(_ANSWER)
        if found and code == 0:
            measured: dict[str, Any] = json.loads(answer)
            return measured
    return {"problem": _telling_line(f"{out}\n{err}") or f"ended with exit code {code} and no answer"}


def _here(gpus: int, environment: Mapping[str, str]) -> list[str]:
    """Options for this machine alone, as launchers/run_local.sh has them."""
    port = environment.get("MASTER_PORT") or str(_free_port())
    options = ["--hostfile", os.devnull, "--master_port", port]
    # With --num_gpus DeepSpeed would take the machine's first GPUs, not those that are named.
    if gpus and environment.get("CUDA_VISIBLE_DEVICES"):
        return options
    return [*options, "--num_gpus", str(gpus or 2)]


def _telling_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line or "error:" in line), lines[-1] if lines else "")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
