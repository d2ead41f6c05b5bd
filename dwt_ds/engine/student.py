"""The student under deepspeed.initialize."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine as StudentEngine
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from dwt_ds.engine.ranks import world_size


def quieten_deepspeed() -> None:
    """Keep DeepSpeed's warnings and errors, drop its running commentary."""
    deepspeed_logger.setLevel(logging.WARNING)
    # It warns of every schedule's very first look at its learning rate.
    deepspeed_logger.addFilter(lambda record: "before it has started" not in record.getMessage())


def start_student(objective: nn.Module, ds_values: dict[str, Any]) -> StudentEngine:
    """Hand the student and its loss to DeepSpeed; `ds_values` has no "auto" left.

    The learning-rate schedule and the optimizer are the JSON's.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=objective, model_parameters=parameters, config=ds_values, dist_init_required=False
    )
    return engine


def gradient_divisor(engine: StudentEngine) -> int:
    """What DeepSpeed divides a sum of micro-batch gradients by before the optimizer sees it.

    It divides each loss by the accumulation steps and takes the mean over ranks (or the sum, by
    `gradient_allreduce_op`). A loss that is to count over the whole global batch is multiplied by this first.
    """
    ranks = 1 if str(engine._config.gradient_allreduce_op).lower() == "sum" else world_size()
    return int(engine.gradient_accumulation_steps()) * ranks


def gradient_norm(engine: StudentEngine) -> float:
    """Global norm of the last step's gradient before clipping."""
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else float("nan")


def write_monitors(engine: StudentEngine, row: Mapping[str, Any]) -> None:
    """Pass a metrics row to the TensorBoard, W&B, Comet or CSV sections of the JSON, by samples as DeepSpeed counts."""
    if engine.monitor.enabled:
        engine.monitor.write_events(
            [(f"Train/Samples/{key}", value, engine.global_samples) for key, value in row.items() if key != "step"]
        )


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory use of this rank so far: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.cuda.max_memory_allocated(device))
