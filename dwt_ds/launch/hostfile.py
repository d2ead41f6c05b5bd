"""The two files a user writes for several hosts, read strictly; DeepSpeed forgives too much or ends in a traceback.

python -m dwt_ds.launch.hostfile FILE [OPTION ...]

prints the names of the hosts that DeepSpeed's launcher would use with these options, one a line, or says what is wrong
and exits with 2.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dwt_ds.launch.options import Options, read_options

EXAMPLE = "launchers/hostfile.example"
# A name, an IPv4 address or an alias of ssh's configuration. pdsh gives a meaning to [] , : @ and a leading ^ or -.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LINE = re.compile(r"(\S+)\s+slots=([1-9][0-9]*)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.+")


class Host(NamedTuple):
    """A line of the hostfile."""

    name: str
    slots: int
    """Ranks on this host, one a GPU."""


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in their order; rank 0 is on the first.

    Raises ValueError of one line, with the line's number and the fix, where DeepSpeed would go on with this machine
    alone (no file), misread the line, or stop without saying where.
    """
    if not path.is_file():
        raise ValueError(f"hostfile {path}: no such file; see {EXAMPLE}")
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
                f'hostfile {path}: line {number} names "{name}"; a host is written in letters, digits and . - _, '
                "one a line (user and port go into ~/.ssh/config)"
            )
        if name in hosts:
            raise ValueError(f"hostfile {path}: line {number} names {name} again; keep one line and add up its slots")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise ValueError(f"hostfile {path}: names no host; see {EXAMPLE}")
    return list(hosts.values())


def active_hosts(hosts: Sequence[Host], options: Options) -> list[Host]:
    """The hosts that DeepSpeed's filters leave, in the hostfile's order, with the slots they leave; rank 0 is on the
    first.

    Raises ValueError of one line where the filters contradict each other, name what the hostfile does not have, or
    leave nothing.
    """
    filters = [(name, text) for name, text in (("--include", options.include), ("--exclude", options.exclude)) if text]
    if len(filters) == 2:
        raise ValueError("DEEPSPEED_ARGS: --include and --exclude do not go together; give one of them")
    if filters:
        name, text = filters[0]
        if options.num_nodes >= 0 or options.num_gpus >= 0:
            raise ValueError(f"DEEPSPEED_ARGS: {name} does not go with --num_nodes or --num_gpus; give one of them")
        named = _named_slots(f"{name} {text}", text, hosts)
        counts = [(host, len(named.get(host.name, ()))) for host in hosts]
        left = [Host(host.name, count if options.include else host.slots - count) for host, count in counts]
        active = [host for host in left if host.slots]
        if not active:
            raise ValueError(f"DEEPSPEED_ARGS: {name} {text} leaves no host; leave out fewer")
        return active
    first = hosts[: options.num_nodes] if options.num_nodes > 0 else hosts
    # DeepSpeed takes that many whatever the hostfile says.
    return [Host(host.name, options.num_gpus if options.num_gpus > 0 else host.slots) for host in first]


def _named_slots(option: str, text: str, hosts: Sequence[Host]) -> dict[str, set[int]]:
    """Name -> slots of every NODE_SPEC; a host named without slots has all of them."""
    slots_of = {host.name: host.slots for host in hosts}
    named: dict[str, set[int]] = {}
    for spec in text.split("@"):
        name, colon, numbers = spec.partition(":")
        if name not in slots_of:
            raise ValueError(
                f'DEEPSPEED_ARGS: {option}: the hostfile has no "{name}"; name its hosts, as in node-1@node-2:0,1'
            )
        slots = named.setdefault(name, set())
        for number in numbers.split(",") if colon else []:
            if not number.isdecimal() or int(number) >= slots_of[name]:
                raise ValueError(
                    f'DEEPSPEED_ARGS: {option}: {name} has no slot "{number}"; it has 0 to {slots_of[name] - 1}'
                )
            slots.add(int(number))
    return {name: slots or set(range(slots_of[name])) for name, slots in named.items()}


def deepspeed_env_paths() -> list[Path]:
    """Where DeepSpeed's launcher looks for variables for the other hosts; a later file goes over an earlier one."""
    return [path for path in (Path.home() / ".deepspeed_env", Path(".deepspeed_env")) if path.is_file()]


def read_deepspeed_env(paths: list[Path]) -> dict[str, str]:
    """The variables that every host of a multi-host run gets.

    Raises ValueError, with the line, for one that DeepSpeed's launcher would stop at with a traceback or, if it is a
    comment with an "=" in it, hand to the hosts' shells and lose everything after it.
    """
    variables: dict[str, str] = {}
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            line = text.strip()
            if not _VARIABLE.fullmatch(line):
                raise ValueError(
                    f'{path}: line {number} is "{line}"; write NAME=VALUE, and neither comments nor empty lines: '
                    "DeepSpeed reads every line as a variable"
                )
            name, _, value = line.partition("=")
            variables[name] = value.strip()
    return variables


def main(arguments: list[str]) -> int:
    """For the scripts: check both files and the options, print the hosts."""
    try:
        hosts = active_hosts(read_hostfile(Path(arguments[0])), read_options(arguments[1:]))
        read_deepspeed_env(deepspeed_env_paths())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(host.name for host in hosts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
