"""Which rank this process is, whatever started it.

DeepSpeed's own launcher, torchrun, and DeepSpeed's launchers for MPICH and Intel MPI set RANK and its companions.
OpenMPI and Slurm number their processes in variables of their own.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from torch.distributed.elastic.utils.distributed import get_free_port

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
# SLURM_STEP_ID: the variables of a batch script, which is no rank, look the same otherwise.
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID")


def fill_rank_environment(environment: MutableMapping[str, str]) -> None:
    """Set what is missing of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT.

    A process that nothing started as a rank becomes a group of one. Raises ValueError where there are several ranks
    and no address to meet at.
    """
    if "RANK" not in environment:
        if _OPENMPI[0] in environment:
            values = [environment[name] for name in _OPENMPI]
        elif all(name in environment for name in _SLURM):
            values = [environment[name] for name in _SLURM[:3]]
            # "4" or "4(x2),3"; the first count holds for all hosts but, at most, the last.
            values.append(environment.get("SLURM_STEP_TASKS_PER_NODE", values[1]).partition("(")[0].partition(",")[0])
        else:
            values = ["0", "1", "0", "1"]
        environment.update(zip(_NAMES, values))
    for name, value in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        environment.setdefault(name, value)
    environment.setdefault("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]))
    if environment["WORLD_SIZE"] == "1":
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(get_free_port()))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"{missing[0]}: not set, and there are {environment['WORLD_SIZE']} ranks; export the first host's address "
            "as MASTER_ADDR and a free port there as MASTER_PORT (dwt-ds launch does)"
        )
