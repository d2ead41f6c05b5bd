"""DeepSpeed's FusedAdam where it cannot be compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dwt_ds.engine import optimizers
from dwt_ds.engine.ds_json.origin import Origin
from dwt_ds.engine.optimizers import check_optimizer


class TestFusedAdam:
    """DeepSpeed compiles it at first use, for which a CUDA device needs nvcc."""

    @pytest.fixture(autouse=True)
    def _no_nvcc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []

        def unusable_reason(name: str, device: torch.device) -> str:
            self.asked.append(name)
            return "MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)"

        monkeypatch.setattr(optimizers, "unusable_reason", unusable_reason)

    @pytest.mark.parametrize("name", ["AdamW", "Adam", "Muon"])
    def test_its_absence_is_told_before_the_folder_is_begun(self, name: str) -> None:
        with pytest.raises(ValueError, match="FusedAdam") as caught:
            check_optimizer({"optimizer": {"type": name, "params": {}}}, torch.device("cuda"), Origin("my.json"))
        assert self.asked == ["deepspeed.FusedAdam"]
        assert str(caught.value) == (
            f"my.json: optimizer.type={name!r}: DeepSpeed's FusedAdam is not usable here (MissingCUDAException: "
            "CUDA_HOME does not exist, unable to compile CUDA op(s)); install nvcc (the CUDA toolkit of torch's "
            f"version, {torch.version.cuda}), or set deepspeed.optimizer.params.torch_adam to true"
        )

    @pytest.mark.parametrize(
        ("values", "device"),
        [
            ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, "cuda"),
            (
                {
                    "optimizer": {"type": "AdamW"},
                    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                },
                "cuda",
            ),
            ({"optimizer": {"type": "AdamW"}}, "cpu"),
        ],
    )
    def test_it_is_not_asked_for_where_it_is_not_used(self, values: dict[str, Any], device: str) -> None:
        check_optimizer(values, torch.device(device), Origin("my.json"))
        assert not self.asked
