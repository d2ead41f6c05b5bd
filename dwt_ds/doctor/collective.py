"""A timed collective over all ranks, started as a run is."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

from dwt_ds.doctor.hosts import run

# As dwt_ds/engine/collective_check.py prints it; only the engine's room imports DeepSpeed.
_ANSWER = "dwt-ds collective: "
_MODULE = "dwt_ds.engine.collective_check"
_SECONDS = 1200.0


def time_collective(hostfile: Path | None, master_address: str, local_ranks: int) -> dict[str, Any]:
    """What rank 0 measured, or {"problem": ...} with the last telling line of the launch.

    `local_ranks` counts without a hostfile. DEEPSPEED_ARGS is heeded as launchers/run_multinode.sh does.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    if hostfile is None:
        command += ["--num_gpus", str(local_ranks), "--master_port", str(_free_port()), "--hostfile", os.devnull]
    else:
        command += ["--hostfile", str(hostfile), "--master_addr", master_address, "--force_multi"]
        command += shlex.split(os.environ.get("DEEPSPEED_ARGS", ""))
    code, out, err = run([*command, "--module", _MODULE], _SECONDS)
    for line in out.splitlines():
        # pdsh puts the host's name before each line.
        _, found, answer = line.partition(_ANSWER)
        if found and code == 0:
            measured: dict[str, Any] = json.loads(answer)
            return measured
    return {"problem": _telling_line(f"{out}\n{err}") or f"ended with exit code {code} and no answer"}


def _telling_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line or "error:" in line), lines[-1] if lines else "")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
