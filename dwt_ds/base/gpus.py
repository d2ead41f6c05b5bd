"""The GPUs that a run uses."""

from __future__ import annotations

import os
from collections.abc import Mapping


def gpu_count(environment: Mapping[str, str] = os.environ) -> int:
    """How many GPUs torch sees in this process; 0 where `environment` makes ranks compute on the CPU."""
    if computes_on_cpu(environment):
        return 0
    import torch  # here: a start on other hosts or on the CPU does not wait for it

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def computes_on_cpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether DeepSpeed is told to leave GPUs alone."""
    return environment.get("DS_ACCELERATOR") == "cpu"
