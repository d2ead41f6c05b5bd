"""The two files a user writes for a run on several hosts, read strictly.

DeepSpeed accepts mistakes in them, or ends in a traceback that does not name the line.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from dwt_ds.base.words import prefix_errors

# A name, an IPv4 address or an alias of ssh's configuration. pdsh gives a meaning to [] , : @ and a leading ^ or -.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LINE = re.compile(r"(\S+)\s+slots=([1-9][0-9]*)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.+")


class Host(NamedTuple):
    """A line of the hostfile."""

    name: str
    slots: int
    """Ranks on this host, one per GPU."""


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in their order; rank 0 is on the first.

    Raises ValueError of one line, with the line's number and the fix, where DeepSpeed would run on this machine alone
    (no file), misread the line, or stop without naming it.
    """
    if not path.is_file():
        raise ValueError(f"hostfile {path}: no such file; write one with a line for each host: HOST slots=N")
    hosts: dict[str, Host] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f'hostfile {path}: line {number} is "{line}"; write it as: HOST slots=N')
        name, slots = match[1], int(match[2])
        if not _NAME.fullmatch(name):
            raise ValueError(
                f'hostfile {path}: line {number} names "{name}"; a host name has only letters, digits and . - _ , '
                "with one host on each line (put user and port into ~/.ssh/config)"
            )
        if name in hosts:
            raise ValueError(f"hostfile {path}: line {number} names {name} again; keep one line and add up its slots")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise ValueError(f"hostfile {path}: names no host; write a line for each host: HOST slots=N")
    return list(hosts.values())


def deepspeed_env_paths() -> list[Path]:
    """Where DeepSpeed's launcher looks for variables for the other hosts; a later file overrides an earlier one."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    return [path for path in (Path.home() / name, Path(name)) if path.is_file()]


def read_deepspeed_env(paths: list[Path]) -> dict[str, str]:
    """The variables that every host of a multi-host run gets.

    Raises ValueError, with the line's number, for a line at which DeepSpeed's launcher would stop with a traceback, or
    a comment with an "=" in it, which DeepSpeed would pass to the hosts' shells, where it hides everything after it.
    """
    variables: dict[str, str] = {}
    for path in paths:
        with prefix_errors(str(path)):
            lines = path.read_text(encoding="utf-8").splitlines()
        for number, text in enumerate(lines, start=1):
            line = text.strip()
            if not _VARIABLE.fullmatch(line):
                raise ValueError(
                    f'{path}: line {number} is "{line}"; write NAME=VALUE, and no comments or empty lines: '
                    "DeepSpeed reads every line as a variable"
                )
            name, _, value = line.partition("=")
            variables[name] = value.strip()
    return variables
