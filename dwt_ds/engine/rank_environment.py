"""Which rank a process is, by the environment variables of what started it."""

from __future__ import annotations

import socket
from collections.abc import MutableMapping

from dwt_ds.base.ports import reserve_port

_RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
# Without SLURM_STEP_ID they are those of a batch script, which is not a rank.
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID")


def fill_rank_environment(environment: MutableMapping[str, str]) -> None:
    """Set what is missing of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT.

    DeepSpeed's launcher, torchrun, and DeepSpeed's launchers for MPICH and Intel MPI set RANK and the others. OpenMPI
    and Slurm number their processes in variables of their own. A process that nothing started as a rank becomes a
    group of one.

    Raises:
        ValueError: there are several ranks, and no address to meet at.
    """
    if "RANK" not in environment:
        if _OPENMPI[0] in environment:
            values = [environment[name] for name in _OPENMPI]
        elif all(name in environment for name in _SLURM):
            values = [environment[name] for name in _SLURM[:3]]
            # "4" or "4(x2),3"; the first count is that of every host, except perhaps the last.
            values.append(environment.get("SLURM_STEP_TASKS_PER_NODE", values[1]).partition("(")[0].partition(",")[0])
        else:
            values = ["0", "1", "0", "1"]
        environment.update(zip(_RANK_NAMES, values))
    for name, value in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        environment.setdefault(name, value)
    environment.setdefault("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]))
    if environment["WORLD_SIZE"] == "1":
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(reserve_port()))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"{missing[0]}: not set, and there are {environment['WORLD_SIZE']} ranks; export the first host's address "
            "as MASTER_ADDR and a free port there as MASTER_PORT (dwt-ds launch does)"
        )


def number_of_visible_device(environment: MutableMapping[str, str], devices: int) -> None:
    """Make LOCAL_RANK the number of a device that this process sees; DeepSpeed takes the device of that number.

    With `srun --gpus-per-task=1` each task sees its own GPU only, as number 0, whatever its local rank.
    """
    if devices == 0:
        raise ValueError(
            f"DS_ACCELERATOR=cuda: torch sees no GPU on {socket.gethostname()}; see whether nvidia-smi lists one there "
            "and what CUDA_VISIBLE_DEVICES is, or set DS_ACCELERATOR=cpu"
        )
    number = str(int(environment["LOCAL_RANK"]) % devices)
    for name in ("LOCAL_RANK", _OPENMPI[2]):  # DeepSpeed asserts that both are equal
        if name in environment:
            environment[name] = number
