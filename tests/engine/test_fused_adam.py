"""Adam where DeepSpeed's FusedAdam cannot be compiled, or is not worth compiling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dwt_ds.engine import optimizers
from dwt_ds.engine.checkpoint import save_and_load
from dwt_ds.engine.ds_json.origin import Origin
from dwt_ds.engine.optimizers import check_optimizer, client_optimizer

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
MINE = Origin("my.json")


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Whether DeepSpeed can compile its FusedAdam for the GPU."""
    there = {"nvcc": False}

    def unusable_reason(name: str, device: torch.device) -> str:
        if device.type == "cpu":  # for offloaded state, any compiler will do
            assert name == "deepspeed.DeepSpeedCPUAdam"
            return ""
        assert name == "deepspeed.FusedAdam"
        return "" if there["nvcc"] else "MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)"

    monkeypatch.setattr(optimizers, "unusable_reason", unusable_reason)
    return there


def adam(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"lr": 0.1, "betas": [0.9, 0.99], **params}}}


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (adam("AdamW"), torch.optim.AdamW),
        (adam("adam"), torch.optim.AdamW),
        (adam("Adam", adam_w_mode=False, bias_correction=True), torch.optim.Adam),
    ],
)
def test_torchs_fused_adam_on_a_cpu_and_without_nvcc(
    device: torch.device, section: dict[str, Any], expected: type, nvcc: dict[str, bool]
) -> None:
    check_optimizer(section, device, MINE)
    make = client_optimizer(section, device)
    assert make is not None
    optimizer = make([nn.Parameter(torch.ones(3))])
    assert type(optimizer) is expected
    assert (optimizer.defaults["fused"], optimizer.defaults["lr"], optimizer.defaults["betas"]) == (
        True,
        0.1,
        (0.9, 0.99),
    )


def test_deepspeeds_adam_where_nvcc_is(nvcc: dict[str, bool]) -> None:
    nvcc["nvcc"] = True
    check_optimizer(adam("AdamW", bias_correction=False), GPU, MINE)
    assert client_optimizer(adam("AdamW"), GPU) is None


@pytest.mark.parametrize("section", [adam("AdamW", torch_adam=True), {**adam("AdamW"), **OFFLOADED}])
def test_what_the_json_decides_stays(section: dict[str, Any], nvcc: dict[str, bool]) -> None:
    check_optimizer(section, GPU, MINE)
    assert client_optimizer(section, GPU) is None


def test_a_setting_that_torchs_adam_lacks(nvcc: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"^my.json: optimizer.params.bias_correction=false: torch's fused Adam"):
        check_optimizer(adam("AdamW", bias_correction=False), GPU, MINE)


def test_muon_needs_nvcc(nvcc: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"optimizer.type='Muon': DeepSpeed's FusedAdam is not usable here .*nvcc"):
        check_optimizer({"optimizer": {"type": "Muon", "params": {}}}, GPU, MINE)


def load(optimizer: torch.optim.Optimizer, read: Callable[[], Any], folder: Path) -> Any:
    """The step count after the optimizer's one parameter was loaded by `read`, in the place of DeepSpeed's engine."""
    engine = SimpleNamespace(
        optimizer=optimizer,
        basic_optimizer=optimizer,
        lr_scheduler=SimpleNamespace(set_rate=lambda: None),
        load_checkpoint=lambda folder, tag: (read() or folder, {}),
    )
    save_and_load._load(engine, folder)
    [state] = optimizer.state.values()
    return state["step"]


@pytest.mark.parametrize("universal", [False, True])
def test_torchs_fused_adam_has_its_step_count_beside_the_weights(universal: bool, tmp_path: Path) -> None:
    """After a resume from DeepSpeed's Adam, which counts in integers, and from a universal checkpoint, which has a
    tensor on the host. A kernel of a GPU would read it there. The meta device stands for the GPU."""
    weight = nn.Parameter(torch.empty(4, device="meta"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    moments = {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    of_deepspeed = {"state": {0: {"step": 5, **moments}}, "param_groups": [{"lr": 0.1, "params": [0]}]}

    def read() -> None:
        if universal:
            optimizer.state[weight] = {"step": torch.tensor(5.0), **moments}
        else:
            optimizer.load_state_dict(of_deepspeed)
            optimizer.param_groups[0]["params"] = []  # as under ZeRO-3, except within a step

    step = load(optimizer, read, tmp_path)
    assert (step.device, step.dtype, step.shape) == (weight.device, torch.float32, ())


@pytest.mark.parametrize("in_muon", [False, True])
def test_deepspeeds_adam_counts_in_integers_after_torchs(
    in_muon: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tensor on a GPU, its kernel's call would wait for the device in each step. Muon has an Adam inside."""
    monkeypatch.setattr(optimizers, "FusedAdam", torch.optim.SGD)  # DeepSpeed's own would be compiled
    monkeypatch.setattr(save_and_load, "replay_adam_steps", lambda optimizer: None)
    weight = nn.Parameter(torch.ones(4))
    adam: Any = torch.optim.SGD([weight], lr=0.1)
    optimizer: Any = torch.optim.Rprop([weight]) if in_muon else adam
    if in_muon:
        optimizer.aux_optimizer, adam.state = adam, optimizer.state
    step = load(optimizer, lambda: optimizer.state.update({weight: {"step": torch.tensor(5.0)}}), tmp_path)
    assert (type(step), step) == (int, 5)


def test_weights_in_the_form_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    """In 16 bits without ZeRO, between machines with and without nvcc. DeepSpeed looks for what is not in the file."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(4))], lr=0.1)
    with pytest.raises(
        ValueError, match=r"FusedAdam stores 16-bit runs in another form .* the optimizer that wrote it"
    ):
        load(optimizer, lambda: {}["fp32_groups_flat"], tmp_path)
    with pytest.raises(KeyError, match="another"):
        load(optimizer, lambda: {}["another"], tmp_path)
