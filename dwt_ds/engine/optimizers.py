"""Optimizers that DeepSpeed does not build for the name in the JSON: NVIDIA apex's, LAMB where DeepSpeed's needs CUDA,
and torch's fused Adam where DeepSpeed's cannot be compiled or gains nothing.

An optimizer is usable if it can be constructed and takes a step. An import alone does not show that: apex imports
without its CUDA extensions, and the package of that name on the Python index is a different project.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import nn

from dwt_ds.base.words import one_line
from dwt_ds.engine.ds_json.combinations import precision, zero_stage
from dwt_ds.engine.ds_json.origin import Origin
from dwt_ds.engine.operator_builds import prepare_operator_builds
from dwt_ds.models.layer_norm import BUILD_APEX

# The settings that the JSON may write for each. Not apex's own clipping, since DeepSpeed has clipped already.
_ADAM = frozenset({"lr", "betas", "eps", "weight_decay", "bias_correction", "adam_w_mode"})
CLIENT_OPTIMIZERS: dict[str, frozenset[str]] = {
    "apex.FusedAdam": _ADAM,
    "apex.FusedLAMB": _ADAM | {"grad_averaging", "use_nvlamb"},
    "pytorch_optimizer.Lamb": frozenset({"lr", "betas", "eps", "weight_decay", "grad_averaging"}),
}

_MODULES = {
    "apex.FusedAdam": "apex.optimizers",
    "apex.FusedLAMB": "apex.optimizers",
    "deepspeed.FusedAdam": "deepspeed.ops.adam",
    "deepspeed.FusedLamb": "deepspeed.ops.lamb",
    "deepspeed.FusedLion": "deepspeed.ops.lion",
    "deepspeed.DeepSpeedCPUAdam": "deepspeed.ops.adam",
    "deepspeed.DeepSpeedCPUAdagrad": "deepspeed.ops.adagrad",
    "deepspeed.DeepSpeedCPULion": "deepspeed.ops.lion",
}
# What DeepSpeed uses where the state is offloaded, unless `torch_adam` is set.
_ON_THE_HOST = {
    **dict.fromkeys(("adam", "adamw", "muon"), "deepspeed.DeepSpeedCPUAdam"),
    "adagrad": "deepspeed.DeepSpeedCPUAdagrad",
    "lion": "deepspeed.DeepSpeedCPULion",
}

_INSTALL_LAMB = "pip install pytorch-optimizer"
_TESTED_UNDER_ZERO = frozenset({"adam", "adamw", "adagrad", "lion", "muon", "apex.fusedadam"})
_ADAMS = frozenset({"adam", "adamw"})
# Settings of Adam that DeepSpeed takes out before it constructs one.
_TAKEN_OUT = frozenset({"adam_w_mode", "torch_adam", "fp32_optimizer_states"})
# `Lamb` is the first of these that is usable.
_LAMBS = ("deepspeed.FusedLamb", "apex.FusedLAMB", "pytorch_optimizer.Lamb")


def check_optimizer(ds_values: Mapping[str, Any], device: torch.device, origin: Origin) -> None:
    """Whether the optimizer of a DeepSpeed JSON can run on this device; `check_optimizer_and_stage` comes before.

    Raises:
        ValueError: one line that says what to install or build, or which setting does not fit.
    """
    section = ds_values.get("optimizer", {})
    name, params = str(section.get("type", "")), section.get("params", {})
    lower, offloaded, on_gpu = name.lower(), _offloaded(ds_values), device.type == "cuda"
    said = f"{origin.name('optimizer.type')}={name!r}"
    if on_gpu and zero_stage(ds_values) == 0 and offloaded:
        raise ValueError(
            f"{origin.name('zero_optimization.offload_optimizer.device')}: without ZeRO the weights stay on the GPU, "
            "where the host's optimizer cannot reach them; set zero_optimization.stage to 1, 2 or 3, or remove it"
        )
    on_the_host = _ON_THE_HOST.get(lower) if offloaded and not params.get("torch_adam") else None
    if on_the_host and (reason := unusable_reason(on_the_host, torch.device("cpu"))):
        raise ValueError(f"{said} is not usable here on offloaded state ({reason}); or remove offload_optimizer")
    if lower == "lamb":
        chosen = choose_lamb(device, said)
        known = CLIENT_OPTIMIZERS.get(chosen)
        foreign = [] if known is None else sorted(set(params) - known)
        if foreign:
            raise ValueError(f"{said}: {chosen}, which is used for it here, has no setting {foreign[0]}; remove it")
    elif lower == "lion" and not offloaded and (reason := unusable_reason("deepspeed.FusedLion", device)):
        raise ValueError(
            f"{said} is not usable here ({reason}); on a CPU, set zero_optimization.offload_optimizer.device to cpu, "
            "or use AdamW"
        )
    elif lower in _ADAMS and params.get("bias_correction") is False and _is_torchs_fused_adam(ds_values, device):
        place = origin.name("optimizer.params.bias_correction")
        raise ValueError(f"{place}=false: torch's fused Adam, used here, has no such setting; remove it")
    elif lower == "muon" and on_gpu and not offloaded and (reason := unusable_reason("deepspeed.FusedAdam", device)):
        raise ValueError(
            f"{said}: DeepSpeed's FusedAdam is not usable here ({reason}); install nvcc (the CUDA toolkit of torch's "
            f"version, {torch.version.cuda}), or use AdamW"
        )
    elif name in CLIENT_OPTIMIZERS and (reason := unusable_reason(name, device)):
        fix = _INSTALL_LAMB if name.startswith("pytorch") else BUILD_APEX
        raise ValueError(f"{said} is not usable here ({reason}); {fix}")
    elif _is_another_of_torch(name) and (reason := _problem_of_a_step(name, device, params)):
        raise ValueError(
            f"{said}: it cannot take a step with these optimizer.params ({reason}); change them, or use AdamW"
        )


def check_optimizer_and_stage(ds_values: Mapping[str, Any], origin: Origin) -> None:
    """Whether the optimizer of a DeepSpeed JSON works with its ZeRO stage and offload, on any device.

    Raises:
        ValueError: one line that says which setting to change.
    """
    stage, offloaded, section = zero_stage(ds_values), _offloaded(ds_values), ds_values.get("optimizer", {})
    name, params = str(section.get("type", "")), section.get("params", {})
    lower = name.lower()
    said = f"{origin.name('optimizer.type')}={name!r}"
    if (lower == "lamb" or name in _LAMBS) and stage > 0:
        raise ValueError(
            f"{said} with zero_optimization.stage={stage}: LAMB scales each layer's step by its norm, and ZeRO "
            "splits the layers over the ranks; set the stage to 0, or use AdamW"
        )
    if lower == "adagrad" and not offloaded:
        if stage > 0:
            raise ValueError(
                f"{said} with zero_optimization.stage={stage}: DeepSpeed replaces it by one that neither the schedule "
                "nor a checkpoint reaches; set zero_optimization.offload_optimizer.device to cpu, or the stage to 0 in "
                "fp32, or use AdamW"
            )
        if (dtype := precision(ds_values)) != "fp32":
            raise ValueError(
                f"{said} with {dtype}.enabled=true: without ZeRO, DeepSpeed cannot save its state in 16 bits; remove "
                f"{dtype}, set zero_optimization.stage to 1 and offload_optimizer.device to cpu, or use AdamW"
            )
    if lower == "muon" and stage == 3 and ds_values["zero_optimization"].get("reduce_scatter", True):
        raise ValueError(
            f"{said} with zero_optimization.stage=3: it needs whole gradients; set zero_optimization.reduce_scatter to "
            "false, or the stage to 2"
        )
    if lower in _ADAMS | {"muon"} and params.get("amsgrad") and not params.get("torch_adam"):
        place = origin.name("optimizer.params.amsgrad")
        raise ValueError(f"{place}=true: DeepSpeed's Adam does not provide it; set optimizer.params.torch_adam to true")
    if lower in _ADAMS:
        _check_adam_settings(params, offloaded=offloaded, origin=origin)
    if stage > 0 and lower not in _TESTED_UNDER_ZERO and not ds_values.get("zero_allow_untested_optimizer"):
        raise ValueError(
            f"{said}: DeepSpeed has not tried it under ZeRO; set zero_allow_untested_optimizer to true (safe "
            "if it updates each element independently), or use AdamW"
        )
    if name in CLIENT_OPTIMIZERS and offloaded:
        raise ValueError(f"{said} does not work on offloaded state; remove offload_optimizer, or use AdamW")


def _check_adam_settings(params: Mapping[str, Any], *, offloaded: bool, origin: Origin) -> None:
    """Refuse settings of another Adam than the one that DeepSpeed constructs, which would end in a traceback."""
    torchs = set(inspect.signature(torch.optim.AdamW).parameters) - {"differentiable"}  # it excludes the fused form
    if params.get("torch_adam"):
        used, known = "torch's Adam", torchs
    else:
        adam = DeepSpeedCPUAdam if offloaded else FusedAdam
        used, known = adam.__name__, set(inspect.signature(adam).parameters)
    foreign = next((key for key in params if key not in known | _TAKEN_OUT), None)
    if foreign is not None:
        fix = ", or set optimizer.params.torch_adam to true" if foreign in torchs else ""
        raise ValueError(f"{origin.name(f'optimizer.params.{foreign}')}: {used} has no such setting; remove it{fix}")


def _is_another_of_torch(name: str) -> bool:
    """Whether DeepSpeed constructs torch's class of that name as it is."""
    return name.lower() not in _TESTED_UNDER_ZERO and hasattr(torch.optim, name)


def _offloaded(ds_values: Mapping[str, Any]) -> bool:
    offload = ds_values.get("zero_optimization", {}).get("offload_optimizer") or {}
    return bool(offload.get("device", "none") != "none")


def choose_lamb(device: torch.device, said: str = "optimizer.type='Lamb'") -> str:
    """The first LAMB that is usable here; `said` begins the message of the ValueError if none is."""
    for name in _LAMBS:
        if not unusable_reason(name, device):
            return name
    reasons = "; ".join(f"{name}: {unusable_reason(name, device)}" for name in _LAMBS)
    raise ValueError(f"{said} is not usable here ({reasons}); {_INSTALL_LAMB}, or use AdamW")


def optimizer_used(ds_values: Mapping[str, Any], device: torch.device) -> str:
    """Which optimizer the one in the JSON is on this machine, after `check_optimizer`; ranks must not differ in it."""
    name = str(ds_values["optimizer"]["type"])
    if name.lower() == "lamb":
        return choose_lamb(device)
    torchs = name.lower() in _ADAMS and _is_torchs_fused_adam(ds_values, device)
    return f"torch's fused {name}" if torchs else name


def client_optimizer(
    ds_values: Mapping[str, Any], device: torch.device
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None:
    """A constructor to pass to `deepspeed.initialize`; None where DeepSpeed builds the optimizer itself."""
    section = ds_values["optimizer"]
    name, params = str(section["type"]), section.get("params", {})
    if name.lower() in _ADAMS and _is_torchs_fused_adam(ds_values, device):
        # As in DeepSpeed, Adam is AdamW unless the JSON says otherwise.
        decoupled = name.lower() == "adamw" or params.get("adam_w_mode", True)
        settings = {
            key: value for key, value in params.items() if key not in {*_TAKEN_OUT, "bias_correction", "set_grad_none"}
        }
        torchs = torch.optim.AdamW if decoupled else torch.optim.Adam
        return lambda parameters: torchs(parameters, fused=True, **settings)
    if name.lower() == "lamb":
        name = choose_lamb(device)
    if name not in CLIENT_OPTIMIZERS:
        return None
    return lambda parameters: _construct(name, parameters, **params)


def _is_torchs_fused_adam(ds_values: Mapping[str, Any], device: torch.device) -> bool:
    """Whether Adam is torch's fused one: on a CPU, where it is as fast as DeepSpeed's, which would first be compiled
    for minutes; and on a GPU without nvcc. Offloaded state needs DeepSpeed's CPU Adam, and `torch_adam` decides too."""
    if _offloaded(ds_values) or ds_values["optimizer"].get("params", {}).get("torch_adam"):
        return False
    return device.type == "cpu" or bool(unusable_reason("deepspeed.FusedAdam", device))


@lru_cache
def unusable_reason(name: str, device: torch.device) -> str:
    """Why the optimizer of that name cannot take a step on this device; empty if it can."""
    prepare_operator_builds()
    return _problem_of_a_step(name, device, {"lr": 0.1}, moves=True)


def _problem_of_a_step(name: str, device: torch.device, settings: Mapping[str, Any], *, moves: bool = False) -> str:
    """Why an optimizer with these settings cannot take a step; empty if it can and, with `moves`, if it goes down."""
    parameter = nn.Parameter(torch.ones(8, device=device))
    parameter.grad = torch.full_like(parameter, 0.1)
    try:
        _construct(name, [parameter], **settings).step()
    except Exception as error:  # a missing package, extension, compiler or device each raises its own kind
        return one_line(error.__cause__ or error, with_type=True)
    if not moves:
        return ""
    moved = bool(torch.isfinite(parameter).all()) and bool((parameter < 1).all())
    return "" if moved else "a step with it did not change a parameter as it should"


def place_adam_steps(optimizer: torch.optim.Optimizer) -> None:
    """Bring the step counts of a loaded checkpoint into the form in which this optimizer has them.

    The kernels of torch's fused Adam read them on the device of the weights, but a universal checkpoint, or one of
    DeepSpeed's Adam, has them on the host. DeepSpeed's Adam needs a number: for a tensor it would wait in each step.
    """
    adam: Any = getattr(optimizer, "aux_optimizer", optimizer)  # Muon's, which shares its state
    for parameter, state in optimizer.state.items():
        if "step" not in state:
            continue
        if isinstance(adam, (DeepSpeedCPUAdam, FusedAdam)):
            state["step"] = int(state["step"])
        elif adam.defaults.get("fused"):
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)


def replay_adam_steps(optimizer: torch.optim.Optimizer) -> None:
    """Repeat the steps of a loaded checkpoint in the C++ state of DeepSpeed's Adam on a CPU, so that a resume is exact.

    It computes the powers of the betas by one multiplication a step. After a jump in the step count it uses std::pow,
    which may differ in the last bit. (DeepSpeed 0.19.8, `Adam_Optimizer::IncrementStep` in csrc/includes/cpu_adam.h.)
    """
    adam: Any = getattr(optimizer, "aux_optimizer", optimizer)  # Muon's, for what is no matrix
    fused = isinstance(adam, FusedAdam) and adam._dummy_overflow_buf.device.type == "cpu"
    if not fused and not isinstance(adam, DeepSpeedCPUAdam):
        return
    group = adam.param_groups[0]
    steps = max((int(state.get("step", 0)) for state in adam.state.values()), default=0)
    weight, gradient, *moments = (torch.zeros(1) for _ in range(4))
    rate, eps, decay = 0.0, 1.0, 0.0
    for step in range(1, steps + 1):
        if fused:
            lists = [[gradient], [weight], *([moment] for moment in moments)]
            settings = (rate, *group["betas"], eps, step, adam.adam_w_mode, group["bias_correction"], decay)
            adam.multi_tensor_adam(1, adam._dummy_overflow_buf, lists, *settings)
        else:
            settings = (step, rate, *group["betas"], eps, decay, group["bias_correction"])
            adam.ds_opt_adam.adam_update(adam.opt_id, *settings, weight, gradient, *moments)


def _construct(name: str, parameters: Iterable[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    package, _, class_name = name.rpartition(".")
    module = importlib.import_module(_MODULES.get(name, package or "torch.optim"))
    if name == "apex.FusedLAMB":
        settings["max_grad_norm"] = math.inf  # its default would clip to 1, after DeepSpeed's own clipping
    elif name == "pytorch_optimizer.Lamb":
        # As in the paper: the scaled update includes the decay, and the first steps are no larger than others.
        settings |= {"weight_decouple": False, "adam_debias": True}
    return getattr(module, class_name)(list(parameters), **settings)
