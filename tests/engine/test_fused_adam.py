"""Adam where DeepSpeed's FusedAdam cannot be compiled, or is not worth compiling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dwt_ds.engine import optimizers
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
