"""What launchers/run_multinode.sh would start, for the doctor to start something else in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dwt_ds.launch.hostfile import Host, active_hosts, read_hostfile
from dwt_ds.launch.options import Options, read_options

# What DeepSpeed itself looks for before it starts one of these, and what brings it.
PROGRAMS = {
    "pdsh": ("pdsh", "apt-get install pdsh"),
    "openmpi": ("ompi_info", "install OpenMPI (apt-get install openmpi-bin)"),
    "mpich": ("mpirun", "install MPICH (apt-get install mpich)"),
    "impi": ("mpirun", "install Intel MPI and source its setvars.sh"),
    "slurm": ("sinfo", "start where Slurm's commands are, inside an allocation"),
}


class Launch(NamedTuple):
    """A start over the hosts of a hostfile."""

    hosts: list[Host]
    """Those that are used, rank 0's first."""
    master: str
    """Address at which the ranks meet."""
    launcher: str
    """A name of PROGRAMS; "none" where DeepSpeed starts this machine's ranks itself."""
    options: list[str]
    """Of DeepSpeed's launcher, all but the program."""
    variables: dict[str, str]
    """To set for it."""

    @property
    def over_ssh(self) -> bool:
        """Whether there are other machines to ask."""
        return not alone(self.hosts)

    @property
    def takes_modules(self) -> bool:
        """Whether --module works; DeepSpeed's commands for MPICH and Slurm are wrong with it."""
        return self.launcher in ("none", "pdsh")


def alone(hosts: list[Host]) -> bool:
    """Whether a hostfile is of this machine alone, which needs no ssh."""
    return [host.name for host in hosts] == ["localhost"]


def how_to_launch(hostfile: Path, environment: Mapping[str, str]) -> Launch:
    """From the hostfile and DEEPSPEED_ARGS, LAUNCHER, LAUNCHER_ARGS, MASTER_ADDR and MASTER_PORT of `environment`.

    A test holds this against the script. Raises ValueError for a hostfile, options or a launcher that cannot be used.
    """
    options = environment.get("DEEPSPEED_ARGS", "").split()
    launcher = environment.get("LAUNCHER")
    port = environment.get("MASTER_PORT")
    options += ["--launcher", launcher] if launcher else []
    options += ["--master_port", port] if port else []
    chosen = read_options(options)
    hosts = active_hosts(read_hostfile(hostfile), chosen)
    master = environment.get("MASTER_ADDR") or hosts[0].name
    name = _launcher(hosts, chosen)
    options.append("--no_ssh_check" if alone(hosts) else "--force_multi")
    launcher_args = environment.get("LAUNCHER_ARGS", "")
    variables = {}
    if name not in ("none", "pdsh"):
        options.append("--no_ssh_check")
        variables = {"MASTER_ADDR": master, "MASTER_PORT": port or "29500"}
        if name == "openmpi":
            launcher_args = f"-x MASTER_ADDR -x MASTER_PORT {launcher_args}"
    options += [f"--launcher_args={launcher_args}"] if launcher_args else []
    return Launch(hosts, master, name, ["--hostfile", str(hostfile), "--master_addr", master, *options], variables)


def _launcher(hosts: list[Host], options: Options) -> str:
    if options.launcher not in PROGRAMS:
        raise ValueError(f"LAUNCHER={options.launcher}: no such launcher; one of {', '.join(PROGRAMS)}")
    return "none" if options.no_ssh or alone(hosts) else options.launcher
