"""The student under deepspeed.initialize."""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine as StudentEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from dwt_ds.base.locks import LOCK_NAME, FolderLock
from dwt_ds.engine.checkpoint.weights import WITHOUT_ZERO, remember_masters
from dwt_ds.engine.cuda_graphs import CudaRecorder, free_graph_memory_bytes
from dwt_ds.engine.ds_json.load import DeepSpeedJson
from dwt_ds.engine.gradients import FlatGradients, can_be_flat, cast_and_clip_at_once, take_one_norm_a_step
from dwt_ds.engine.learning_rate import LearningRate
from dwt_ds.engine.loss_scale import correct_loss_scaling
from dwt_ds.engine.optimizers import client_optimizer
from dwt_ds.engine.ranks import device as student_device
from dwt_ds.engine.ranks import rank, world_size
from dwt_ds.engine.training_graphs import GraphedTraining

_MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def quieten_deepspeed() -> None:
    """Show DeepSpeed's warnings and errors only."""
    deepspeed_logger.setLevel(logging.WARNING)
    # Every schedule triggers this warning when its learning rate is first read.
    deepspeed_logger.addFilter(lambda record: "before it has started" not in record.getMessage())


def check_precision(ds: DeepSpeedJson) -> None:
    """Raise ValueError unless DeepSpeed computes in the JSON's precision on this device."""
    device = get_accelerator()
    supported = {"fp32": True, "bf16": device.is_bf16_supported(), "fp16": device.is_fp16_supported()}
    if not supported[ds.precision]:
        others = " or ".join(name for name in ("bf16", "fp32") if supported[name])
        raise ValueError(
            f"{ds.origin.name(f'{ds.precision}.enabled')}=true: DeepSpeed has no {ds.precision} on this device "
            f"({device.device_name()}); choose {others}, as in zero2_{others.split()[0]}"
        )


def check_monitors(ds: DeepSpeedJson) -> None:
    """Raise ValueError unless the packages of the JSON's monitors are installed; DeepSpeed fails on rank 0 alone."""
    for section, package in _MONITOR_PACKAGES.items():
        if ds.values.get(section, {}).get("enabled") and find_spec(package) is None:
            place = ds.origin.name(f"{section}.enabled")
            raise ValueError(f"{place}=true: {package} is not installed; pip install {package}")


def occupy_nvme(ds: DeepSpeedJson) -> None:
    """Be the only run whose parameters this rank keeps on the NVMe drive, if the JSON wants them there.

    DeepSpeed removes what it finds at the JSON's nvme_path, and gives its files the same names in every run.

    Raises ValueError where libaio is missing or another run's parameters are there, OSError for a bad path.
    """
    offload = ds.values.get("zero_optimization", {}).get("offload_param") or {}
    if ds.zero_stage < 3 or offload.get("device") != "nvme":
        return
    place = ds.origin.name("zero_optimization.offload_param")
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            f"{place}.device=nvme: DeepSpeed's operator for it needs libaio and its headers; install them (Debian: "
            "libaio-dev), or set it to cpu"
        )
    path = str(offload["nvme_path"])
    FolderLock(Path(path), f"{place}.nvme_path={path!r}", name=f"{LOCK_NAME}_{rank()}", mode=0o700)


def gather_at_once(modules: Iterable[nn.Module]) -> None:
    """Let ZeRO-3 gather all weights of a module before it is called, and not those of each part before the part.

    So its hooks run outside of what is compiled in the module. To be called before `start_student`; it changes nothing
    at other stages. Each module must be called as a whole, or its gradients are never reduced.
    """
    for module in modules:
        set_z3_leaf_module(module, True)


def start_student(
    objective: nn.Module,
    ds_values: dict[str, Any],
    recorder: CudaRecorder | None = None,
    *,
    compiles: bool = False,
    folder: Path = Path(),
) -> StudentEngine:
    """DeepSpeed's engine around the student and its loss.

    Args:
        objective: returns the loss; parameters that require no gradient are not trained.
        ds_values: a JSON without "auto", with optimizer and schedule.
        recorder: of CUDA graphs for training passes, where the gradients can be in one buffer; None: never.
        compiles: whether to compile what is done to the gradients before an update, where they are in one buffer.
        folder: of the run.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    for wrapper in WITHOUT_ZERO:
        # They would take a step with gradients of zero: weights decay, and Adam counts one step too many ever after.
        wrapper.initialize_optimizer_states = lambda self: None
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=client_optimizer(ds_values, student_device()),
        model_parameters=parameters,
        lr_scheduler=lambda optimizer: LearningRate(optimizer, ds_values["scheduler"]),
        # DeepSpeed's timer makes the host wait for the device at each micro-batch, for a figure that is not shown here.
        config={"timers": {"throughput": {"enabled": False}}, **with_monitors_in(folder, ds_values)},
        dist_init_required=False,
    )
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        engine.clip_fp32_gradients = lambda: None
        clip_and_step_if_finite(engine.optimizer, float(engine.gradient_clipping()))
    elif isinstance(engine.optimizer, WITHOUT_ZERO):
        remember_masters(engine.optimizer)
    take_one_norm_a_step(engine.optimizer)
    if engine.fp16_enabled():
        correct_loss_scaling(engine)
        engine.fp16_auto_cast = lambda: False  # what the objective takes has its dtypes, and is more than tensors
    if can_be_flat(engine.optimizer):
        gradients = FlatGradients(engine.optimizer)
        in_16_bits = engine.fp16_enabled() or engine.bfloat16_enabled()
        if compiles and in_16_bits:
            cast_and_clip_at_once(engine.optimizer)
        if recorder is not None:
            GraphedTraining(objective, gradients, recorder, lambda: float(engine.optimizer.loss_scale))
    return engine


def release_recorded_passes(engine: StudentEngine) -> None:
    """Drop the training passes that are CUDA graphs, if any, before the teacher is released: they hold its head."""
    forward = engine.module.forward
    if isinstance(forward, GraphedTraining):
        forward.release()


def gradient_divisor(engine: StudentEngine) -> int:
    """The number by which DeepSpeed divides the sum of all micro-batch gradients.

    It divides each loss by the accumulation steps and takes the mean over ranks (or the sum, with
    `gradient_allreduce_op`). Multiply a loss by this number if it is already a share of the global batch's mean.
    """
    ranks = 1 if str(engine._config.gradient_allreduce_op).lower() == "sum" else world_size()
    return int(engine.gradient_accumulation_steps()) * ranks


def before_waiting_for_norm(engine: StudentEngine, start_work: Callable[[], None]) -> None:
    """Call `start_work` in each optimizer step under ZeRO-1 and ZeRO-2, before the host waits for the gradient norm.

    What it starts on the device must not depend on the weights, and must be the same on all ranks if it communicates.
    Elsewhere it is not called.
    """
    engine.optimizer.before_waiting_for_norm = start_work


def gradient_norm(engine: StudentEngine) -> float:
    """Global norm of the last step's gradient before clipping."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def step_was_skipped(engine: StudentEngine) -> bool:
    """Whether the optimizer skipped the last step because a gradient was not finite on some rank."""
    return bool(getattr(engine.optimizer, "overflow", False))


def loss_scale(engine: StudentEngine) -> float | None:
    """The dynamic or static loss scale of fp16 training; None in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def clip_and_step_if_finite(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Make a plain optimizer clip and skip bad steps as DeepSpeed's wrappers do; fp32 without ZeRO has no wrapper.

    DeepSpeed reads `overflow` after each step; if it is set, the step counts as skipped and the learning rate stays.
    It also reads the norm before clipping, which its own clipping of plain optimizers does not store. A `max_norm` of 0
    switches clipping off.
    """
    take_step = optimizer.step

    def step_if_finite(closure: None = None) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        total = float(norm)
        finite = math.isfinite(total)
        optimizer._global_grad_norm = total  # type: ignore[attr-defined]
        optimizer.overflow = not finite  # type: ignore[attr-defined]
        if finite:
            if max_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            take_step()

    optimizer.step = step_if_finite  # type: ignore[method-assign,assignment]


def with_monitors_in(folder: Path, ds_values: dict[str, Any]) -> dict[str, Any]:
    """`ds_values` with the files of CSV and TensorBoard in a run's folder, unless the JSON says where.

    By DeepSpeed's default all runs started in one folder append to the same files.
    """
    sections = [name for name in ("csv_monitor", "tensorboard") if name in ds_values]
    paths = {name: ds_values[name].get("output_path") or str(folder) for name in sections}
    return ds_values | {name: {**ds_values[name], "output_path": path} for name, path in paths.items()}


def write_monitors(engine: StudentEngine, row: Mapping[str, Any]) -> None:
    """Write a metrics row to the JSON's TensorBoard, W&B, Comet or CSV monitors, by number of samples.

    Monitors take numbers: true is 1.
    """
    if engine.monitor.enabled:
        numbers = {key: int(value) if isinstance(value, bool) else value for key, value in row.items() if key != "step"}
        engine.monitor.write_events(
            [(f"Train/Samples/{key}", value, engine.global_samples) for key, value in numbers.items()]
        )


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory use of this rank so far, in bytes: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.cuda.max_memory_allocated(device)) + free_graph_memory_bytes()
