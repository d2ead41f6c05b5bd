"""Commands on the hosts of a hostfile, and on this one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from dwt_ds.doctor.probe import ANSWER, Question

_SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
# Operators may have to be compiled first.
PROBE_SECONDS = 1200.0


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
        return Reach(_last_line(err) or f"ssh ended with {code} and no answer", 0.0, 0.0)
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
    code, out, err = run(command, PROBE_SECONDS)
    for line in reversed(out.splitlines()):
        if line.startswith(ANSWER):
            answers: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
            return answers
    return {"problem": _last_line(err) or f"ended with exit code {code} and no answer"}


def run(
    command: Sequence[str], timeout_seconds: float, variables: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, with `variables` over the environment; 124 after the time, with nothing left
    running here."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **(variables or {})},
            start_new_session=True,
        )
    except OSError as error:
        return 127, "", f"{command[0]}: {error.strerror}"
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except BaseException as stopped:
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate()
        if not isinstance(stopped, subprocess.TimeoutExpired):
            raise
        return 124, out, f"no answer within {timeout_seconds:.0f} s"
    return process.returncode, out, err


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
