"""A timed collective over all ranks, started as a run is."""

from __future__ import annotations

import json
from typing import Any

from dwt_ds.doctor.commands import run
from dwt_ds.launch.local import Launch

# As dwt_ds/engine/collective_check.py prints it; only the engine's room imports DeepSpeed.
_ANSWER = "dwt-ds collective: "
_MODULE = "dwt_ds.engine.collective_check"
_SECONDS = 1200.0


def time_collective(launch: Launch) -> dict[str, Any]:
    """What rank 0 measured, or {"problem": ...} with the last telling line of the start."""
    code, out, err = run(launch.command(_MODULE), _SECONDS, launch.environment)
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
