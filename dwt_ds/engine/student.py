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

from dwt_ds.engine.optimizers import client_optimizer
from dwt_ds.engine.ranks import device as student_device
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
        model=objective,
        optimizer=client_optimizer(ds_values["optimizer"], student_device()),
        model_parameters=parameters,
        config=ds_values,
        dist_init_required=False,
    )
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        skip_steps_that_are_not_finite(engine.optimizer)
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


def step_was_skipped(engine: StudentEngine) -> bool:
    """Whether the optimizer refused the last step because a gradient was not finite on some rank."""
    return bool(getattr(engine.optimizer, "overflow", False))


def loss_scale(engine: StudentEngine) -> float | None:
    """The dynamic or static loss scale of fp16 training; None in other precisions."""
    return float(engine.optimizer.cur_scale) if engine.fp16_enabled() else None


def skip_steps_that_are_not_finite(optimizer: torch.optim.Optimizer) -> None:
    """Give a plain optimizer the check that DeepSpeed's own wrappers have; ZeRO-0 in fp32 runs without a wrapper.

    DeepSpeed reads `overflow` after each step: it counts the step as skipped and leaves the learning rate alone.
    """
    take_step = optimizer.step

    def step_if_finite(closure: None = None) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        optimizer.overflow = not finite  # type: ignore[attr-defined]
        if finite:
            take_step()

    optimizer.step = step_if_finite  # type: ignore[method-assign,assignment]


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
