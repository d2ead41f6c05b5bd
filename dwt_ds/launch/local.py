"""Options of the `deepspeed` launcher for ranks on this machine."""

from __future__ import annotations

import os
import socket

import torch


def visible_ranks(without_gpu: int) -> int:
    """Ranks of a run on this machine: one a visible GPU, or `without_gpu`."""
    return torch.cuda.device_count() if torch.cuda.is_available() else without_gpu


def launcher_options(ranks: int) -> list[str]:
    """So many local ranks that meet at a free port.

    DeepSpeed forgets CUDA_VISIBLE_DEVICES when it is given `--num_gpus`, so the devices are named where that is set.
    Raises ValueError where they are too few, or named in a way that DeepSpeed does not read.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if torch.cuda.is_available() else ""
    devices = [name.strip() for name in visible.split(",") if name.strip()]
    if devices and (len(devices) < ranks or not all(name.isdigit() for name in devices[:ranks])):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible!r} with {ranks} ranks: DeepSpeed needs the number of a GPU for each rank, "
            "such as 0,1"
        )
    chosen = ["--include", f"localhost:{','.join(devices[:ranks])}"] if devices else ["--num_gpus", str(ranks)]
    return ["--log_level", "warning", *chosen, "--master_port", str(_free_port())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
