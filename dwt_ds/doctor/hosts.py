"""What hosts are asked for: a login, the answers of their probe, a collective over all ranks."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from dwt_ds.doctor.commands import error_line, run
from dwt_ds.doctor.probe import ANSWER, Question
from dwt_ds.engine import COLLECTIVE_ANSWER
from dwt_ds.launch.local import Launch

_SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
# Operators may have to be compiled first.
_PROBE_SECONDS = 1200.0
_COLLECTIVE_SECONDS = 1200.0


class Reach(NamedTuple):
    """How a host answered over ssh."""

    problem: str
    """"" if it answered."""
    clock_ahead_seconds: float
    """Its clock minus ours."""
    uncertain_seconds: float
    """Half of the time the question took."""


def reach(host: str) -> Reach:
    """Log in without a password, as pdsh and mpirun will, and ask for the time."""
    asked = time.time()
    code, out, err = run([*_SSH, host, "date +%s.%N"], timeout_seconds=60.0)
    answered = time.time()
    try:
        theirs = float(out.split()[-1])
    except (IndexError, ValueError):
        return Reach(error_line(err) or f"ssh ended with {code} and no answer", 0.0, 0.0)
    return Reach("", theirs - (asked + answered) / 2, (answered - asked) / 2)


def ask(host: str | None, question: Question, variables: Mapping[str, str]) -> dict[str, Any]:
    """The answers of a host's probe, or {"problem": ...}; None is this machine, without ssh.

    A remote host runs the same interpreter in the same folder, as DeepSpeed's launcher has it.
    """
    command = [sys.executable, "-m", "dwt_ds.doctor.probe", json.dumps(asdict(question))]
    if host is not None:
        settings = [f"{name}={value}" for name, value in {"PYTHONPATH": os.getcwd(), **variables}.items()]
        remote = f"cd {shlex.quote(os.getcwd())} && {shlex.join(['env', *settings, *command])}"
        command = [*_SSH, "-o", "ServerAliveInterval=15", host, remote]
    code, out, err = run(command, _PROBE_SECONDS)
    for line in reversed(out.splitlines()):
        if line.startswith(ANSWER):
            return json.loads(line.removeprefix(ANSWER))
    return {"problem": error_line(err) or f"ended with exit code {code} and no answer"}


def time_collective(launch: Launch) -> dict[str, Any]:
    """What rank 0 measured, or {"problem": ...} with the last line of output that names an error."""
    code, out, err = run(launch.command("dwt_ds.engine.collective_check"), _COLLECTIVE_SECONDS, launch.environment)
    for line in out.splitlines():
        # pdsh puts the host's name before each line.
        _, found, answer = line.partition(COLLECTIVE_ANSWER)
        if found and code == 0:
            return json.loads(answer)
    return {"problem": error_line(f"{out}\n{err}") or f"ended with exit code {code} and no answer"}
