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
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if torch.cuda.is_available() else ""
    devices = ",".join(visible.split(",")[:ranks])
    chosen = ["--include", f"localhost:{devices}"] if devices else ["--num_gpus", str(ranks)]
    return ["--log_level", "warning", *chosen, "--master_port", str(_free_port())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
