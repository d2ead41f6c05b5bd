"""Ranks on the hosts of a hostfile: DeepSpeed's filters, and which launcher starts the ranks.

DeepSpeed's own options are read here, without DeepSpeed, because hosts and launcher are needed before it is started.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from dwt_ds.launch.hostfile import Host, deepspeed_env_paths, read_deepspeed_env, read_hostfile
from dwt_ds.launch.local import DEEPSPEED, Launch, launcher_environment, only_here, whole_number

# LAUNCHER -> the program that it needs, and what installs it.
PROGRAMS = {
    "pdsh": ("pdsh", "apt-get install pdsh"),
    "openmpi": ("ompi_info", "install OpenMPI (apt-get install openmpi-bin)"),
    "mpich": ("mpirun", "install MPICH (apt-get install mpich)"),
    "impi": ("mpirun", "install Intel MPI and source its setvars.sh"),
    "slurm": ("sinfo", "start where Slurm's commands are, inside an allocation"),
    "srun": ("srun", "start where Slurm's commands are, inside an allocation"),
}


class Options(NamedTuple):
    """Those options of DeepSpeed's launcher that decide where ranks are and who starts them, with its defaults."""

    include: str = ""
    """NODE_SPEC[@NODE_SPEC ...], where NODE_SPEC is NAME[:SLOT[,SLOT ...]]."""
    exclude: str = ""
    num_nodes: int = -1
    num_gpus: int = -1
    launcher: str = "pdsh"
    master_port: int = 29500
    no_ssh: bool = False
    no_ssh_check: bool = False
    ssh_port: int | None = None
    launcher_args: str = ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"DEEPSPEED_ARGS: {message}")


def read_options(arguments: Sequence[str]) -> Options:
    """`arguments` in every spelling that DeepSpeed takes; other options are ignored.

    Raises ValueError for a value that is missing or no number.
    """
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-i", "--include")
    parser.add_argument("-e", "--exclude")
    parser.add_argument("--num_nodes", type=int)
    parser.add_argument("--num_gpus", "--num_accelerators", type=int)
    parser.add_argument("--launcher", type=str.lower)
    parser.add_argument("--master_port", type=int)
    parser.add_argument("--no_ssh", action="store_true")
    parser.add_argument("--no_ssh_check", action="store_true")
    parser.add_argument("--ssh_port", type=int)
    parser.add_argument("--launcher_args")
    known, _ = parser.parse_known_args(list(arguments))
    return Options(**vars(known))


def active_hosts(hosts: Sequence[Host], options: Options) -> list[Host]:
    """The hosts that DeepSpeed's filters leave, in the hostfile's order, with the slots that they leave.

    Raises ValueError of one line where the filters contradict each other, name what the hostfile does not have, or
    leave nothing.
    """
    filters = [(name, text) for name, text in (("--include", options.include), ("--exclude", options.exclude)) if text]
    if len(filters) == 2:
        raise ValueError("DEEPSPEED_ARGS: --include and --exclude cannot be combined; give one of them")
    if filters:
        name, text = filters[0]
        if options.num_nodes >= 0 or options.num_gpus >= 0:
            raise ValueError(
                f"DEEPSPEED_ARGS: {name} cannot be combined with --num_nodes or --num_gpus; give one of them"
            )
        named = _named_slots(f"{name} {text}", text, hosts)
        counts = [(host, len(named.get(host.name, ()))) for host in hosts]
        left = [Host(host.name, count if options.include else host.slots - count) for host, count in counts]
        active = [host for host in left if host.slots]
        if not active:
            raise ValueError(f"DEEPSPEED_ARGS: {name} {text} leaves no host; exclude fewer")
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


def on_hosts(hostfile: Path, environment: Mapping[str, str]) -> Launch:
    """Ranks on a hostfile's hosts, with DEEPSPEED_ARGS, LAUNCHER, LAUNCHER_ARGS, MASTER_ADDR and MASTER_PORT of
    `environment`.

    LAUNCHER=srun starts DeepSpeed's launcher once on each node of a Slurm allocation, without ssh; the hostfile has to
    list all nodes in Slurm's order.

    Raises ValueError of one line for a hostfile, a .deepspeed_env or variables that cannot be used.
    """
    options = environment.get("DEEPSPEED_ARGS", "").split()
    options += ["--launcher", environment["LAUNCHER"]] if environment.get("LAUNCHER") else []
    port = whole_number(environment, "MASTER_PORT", at_most=65535)
    options += ["--master_port", str(port)] if port else []
    chosen = read_options(options)
    if chosen.launcher not in PROGRAMS:
        raise ValueError(f"LAUNCHER={chosen.launcher}: no such launcher; one of {', '.join(PROGRAMS)}")
    listed = read_hostfile(hostfile)
    hosts = active_hosts(listed, chosen)
    master = environment.get("MASTER_ADDR") or hosts[0].name
    launcher = "none" if chosen.no_ssh or only_here(hosts) else chosen.launcher
    # DeepSpeed logs in to every first host, this machine too, and takes one host for this machine whatever its name.
    options.append("--no_ssh_check" if only_here(hosts) else "--force_multi")
    launcher_args = _launcher_args(environment)
    host_variables = read_deepspeed_env(deepspeed_env_paths())
    started, prefix = launcher_environment(environment), DEEPSPEED
    if launcher == "pdsh":
        # Notices within about a minute that a host is gone; ssh alone would wait for hours.
        alive = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
        started["PDSH_SSH_ARGS_APPEND"] = f"{alive} {environment.get('PDSH_SSH_ARGS_APPEND', '')}"
    elif launcher == "srun":
        if hosts != listed:
            raise ValueError("DEEPSPEED_ARGS: LAUNCHER=srun uses all nodes of the job; remove the filters")
        options.append("--no_ssh")
        started |= host_variables
        prefix, launcher_args = _once_on_each_node(environment, launcher_args), []
    elif launcher != "none":
        # None of these tells the ranks where to meet, and mpirun does itself what ssh it needs.
        options.append("--no_ssh_check")
        started |= {"MASTER_ADDR": master, "MASTER_PORT": str(chosen.master_port)}
        if launcher == "openmpi":
            launcher_args = ["-x", "MASTER_ADDR", "-x", "MASTER_PORT", *launcher_args]
    options += [f"--launcher_args={shlex.join(launcher_args)}"] if launcher_args else []
    options = ["--hostfile", str(hostfile), "--master_addr", master, *options]
    return Launch(hosts, master, launcher, options, started, host_variables, prefix)


def require_program(launcher: str) -> None:
    """Raise ValueError if the program behind `launcher` is not installed: DeepSpeed would stop with a traceback."""
    program, fix = PROGRAMS.get(launcher, ("", ""))
    if program and shutil.which(program) is None:
        raise ValueError(f"LAUNCHER={launcher}: {program} is not installed here; {fix}, or use another launcher")


def _launcher_args(environment: Mapping[str, str]) -> list[str]:
    text = environment.get("LAUNCHER_ARGS", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"LAUNCHER_ARGS={text}: {error}; close it") from None


def _once_on_each_node(environment: Mapping[str, str], srun_args: list[str]) -> list[str]:
    """srun with DeepSpeed's launcher, which gets the node's number from the shell there."""
    cores = environment.get("SLURM_CPUS_ON_NODE", "1")
    srun = ["srun", "--ntasks-per-node=1", f"--cpus-per-task={cores}", "--kill-on-bad-exit=1", "--label", *srun_args]
    on_node = 'exec "$0" -m deepspeed.launcher.runner --node_rank "$SLURM_NODEID" "$@"'
    return [*srun, "bash", "-c", on_node, sys.executable]
