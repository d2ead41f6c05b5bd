"""Which optimizers run here, and what is reported of those that do not. Modules made here stand in for apex."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from harness.apex import install_apex
from harness.errors import error_of
from harness.ranks import Train
from harness.runs import assert_same_run, back_to, completed, logged_rows
from torch import nn
from torch.utils import cpp_extension

from dwt_ds.engine import optimizers
from dwt_ds.engine.ds_json.load import load_ds_json
from dwt_ds.engine.ds_json.origin import Origin
from dwt_ds.engine.optimizers import (
    check_optimizer,
    check_optimizer_and_stage,
    choose_lamb,
    client_optimizer,
    unusable_reason,
)

CPU = torch.device("cpu")
MINE = Origin("my.json")
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.fixture(autouse=True)
def _forget_probes() -> Iterator[None]:
    unusable_reason.cache_clear()
    yield
    unusable_reason.cache_clear()


class FakeFused(torch.optim.SGD):
    """Takes apex's settings and steps like SGD."""

    def __init__(self, params: Any, lr: float = 0.1, max_grad_norm: float = 1.0, **settings: Any) -> None:
        super().__init__(params, lr=lr)
        self.max_grad_norm, self.settings = max_grad_norm, settings


def check_error(ds_values: dict[str, Any]) -> str:
    return error_of(check_optimizer, ds_values, CPU, MINE)


class TestApex:
    def test_a_usable_one_is_constructed_with_the_settings_of_the_json(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_apex(monkeypatch, "optimizers", FusedAdam=FakeFused, FusedLAMB=FakeFused)
        section = {"type": "apex.FusedLAMB", "params": {"lr": 0.5, "weight_decay": 0.1}}
        check_optimizer({"optimizer": section}, CPU, MINE)
        make = client_optimizer({"optimizer": section}, CPU)
        assert make is not None
        made = make([nn.Parameter(torch.ones(2))])
        assert isinstance(made, FakeFused)
        assert made.param_groups[0]["lr"] == 0.5
        assert made.settings == {"weight_decay": 0.1}
        assert made.max_grad_norm == float("inf")  # DeepSpeed clips

    @pytest.mark.parametrize("name", ["apex.FusedAdam", "apex.FusedLAMB"])
    def test_its_absence_is_reported_with_what_to_build(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "apex", None)
        message = check_error({"optimizer": {"type": name}})
        assert message.startswith(f"my.json: optimizer.type={name!r} is not usable here (ModuleNotFoundError")
        assert "build NVIDIA's apex from source" in message
        assert "APEX_CUDA_EXT=1" in message

    def test_the_other_package_of_that_name_is_not_mistaken_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_apex(monkeypatch, "optimizers")
        message = check_error({"optimizer": {"type": "apex.FusedAdam"}})
        assert "is not usable here" in message
        assert "the package called apex on the Python index is another project" in message

    def test_one_without_its_cuda_extension_is_found_out_by_constructing_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def without_extension(*_: Any, **__: Any) -> None:
            raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

        install_apex(monkeypatch, "optimizers", FusedAdam=without_extension)
        assert "(RuntimeError: apex.optimizers.FusedAdam requires cuda extensions)" in check_error(
            {"optimizer": {"type": "apex.FusedAdam"}}
        )

    @pytest.mark.parametrize("wrong", [0.0, float("nan")])
    def test_one_whose_step_is_wrong_is_found_out_by_running_it(
        self, wrong: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(params: Any, lr: float, **_: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD([{"params": params, "lr": torch.tensor(lr * wrong).item()}], lr=lr)

        install_apex(monkeypatch, "optimizers", FusedAdam=broken)
        assert "did not change a parameter" in check_error({"optimizer": {"type": "apex.FusedAdam"}})

    def test_settings_of_the_json_are_checked_without_it(self, tmp_path: Path) -> None:
        values = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero2_bf16.json").read_text())
        values["optimizer"]["type"] = "apex.FusedAdam"
        file = tmp_path / "apex.json"
        file.write_text(json.dumps(values))
        assert set(load_ds_json(str(file), {}).values["optimizer"]["params"]) == {"lr", "betas", "eps", "weight_decay"}
        with pytest.raises(ValueError, match=r"optimizer\.params\.momentum: apex\.FusedAdam has no such setting"):
            load_ds_json(str(file), {"optimizer": {"params": {"momentum": 0.9}}})
        with pytest.raises(ValueError, match=r"optimizer\.params\.max_grad_norm: DeepSpeed clips by itself"):
            load_ds_json(str(file), {"optimizer": {"params": {"max_grad_norm": 1.0}}})
        with pytest.raises(ValueError, match=r"optimizer\.type='apex\.fusedadam': .* did you mean 'apex\.FusedAdam'"):
            load_ds_json(str(file), {"optimizer": {"type": "apex.fusedadam"}})


def test_one_that_deepspeed_has_not_tried_under_zero_needs_a_word() -> None:
    values: dict[str, Any] = {"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 1}}
    with pytest.raises(ValueError, match="set zero_allow_untested_optimizer to true"):
        check_optimizer_and_stage(values, MINE)
    check_optimizer_and_stage({**values, "zero_allow_untested_optimizer": True}, MINE)
    check_optimizer_and_stage({**values, "zero_optimization": {"stage": 0}}, MINE)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        *(
            ({"optimizer": {"type": name}, "zero_optimization": {"stage": stage}}, f"stage={stage}: .*the stage to 0")
            for name, stage in (("Lamb", 1), ("apex.FusedLAMB", 2), ("pytorch_optimizer.Lamb", 3))
        ),
        ({"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 2}}, "zero_allow_untested_optimizer to true"),
        ({"optimizer": {"type": "Adagrad"}, "zero_optimization": {"stage": 1}}, "stage=1: .*offload_optimizer.device"),
        ({"optimizer": {"type": "Adagrad"}, "bf16": {"enabled": True}}, "bf16.enabled=true: .*cannot save its state"),
        ({"optimizer": {"type": "apex.FusedAdam"}, "zero_optimization": OFFLOAD}, "not work on offloaded state"),
    ],
)
def test_what_no_device_can_do_is_reported_without_one(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^my.json: optimizer.type=.*{words}"):
        check_optimizer_and_stage(values, MINE)
    check_optimizer_and_stage({"optimizer": {"type": "AdamW"}, "zero_optimization": OFFLOAD}, MINE)
    check_optimizer_and_stage({"optimizer": {"type": "Adagrad"}, "zero_optimization": OFFLOAD}, MINE)
    check_optimizer_and_stage({"optimizer": {"type": "Adagrad"}}, MINE)
    check_optimizer_and_stage({"optimizer": {"type": "Lamb"}}, MINE)


@pytest.mark.parametrize(
    ("params", "zero", "message"),
    [
        ({"fused": True}, {}, "fused: FusedAdam has no such setting; remove it, or set optimizer.params.torch_adam to"),
        ({"maximize": False}, OFFLOAD, "maximize: DeepSpeedCPUAdam has no such setting; remove it, or set optimizer."),
        ({"set_grad_none": True}, OFFLOAD, "set_grad_none: DeepSpeedCPUAdam has no such setting; remove it"),
        (
            {"torch_adam": True, "bias_correction": True},
            {},
            "bias_correction: torch's Adam has no such setting; remove it",
        ),
        ({"torch_adam": True, "differentiable": True}, {}, "differentiable: torch's Adam has no such setting"),
        ({"torch_adam": True, "fused": True, "foreach": None, "maximize": False}, {}, None),
        ({"set_grad_none": True, "adam_w_mode": False, "fp32_optimizer_states": True}, {}, None),
        ({"bias_correction": True, "fp32_optimizer_states": True}, OFFLOAD, None),
    ],
)
def test_settings_of_another_adam_are_refused(
    params: dict[str, Any], zero: dict[str, Any], message: str | None
) -> None:
    values = {"optimizer": {"type": "AdamW", "params": params}, "zero_optimization": zero}
    if message is None:
        check_optimizer_and_stage(values, MINE)
    else:
        said = error_of(check_optimizer_and_stage, values, MINE)
        assert said.startswith(f"my.json: optimizer.params.{message}")


def test_offloading_without_zero_is_refused_on_a_gpu() -> None:
    values = {
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {**OFFLOAD, "stage": 0},
    }
    said = error_of(check_optimizer, values, torch.device("cuda"), MINE)
    assert said.startswith(
        "my.json: zero_optimization.offload_optimizer.device: without ZeRO the weights stay on the GPU"
    )
    check_optimizer(values, torch.device("cpu"), MINE)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad", "Lion", "Muon"])
def test_an_optimizer_of_the_host_that_cannot_be_compiled_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(**settings: Any) -> None:
        raise RuntimeError(
            "Error building extension\n[1/2] c++ -c a.cpp\na.cpp:1:10: fatal error: Python.h: No such file"
        )

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(OpBuilder, "jit_load", OpBuilder.jit_load)  # put back afterwards
    said = check_error({"optimizer": {"type": name}, "zero_optimization": OFFLOAD})
    assert said.startswith(f"my.json: optimizer.type='{name}' is not usable here on offloaded state (ValueError: ")
    assert "(a.cpp:1:10: fatal error: Python.h: No such file); install a C++ compiler" in said


@pytest.mark.parametrize(
    ("name", "params", "reason"),
    [
        ("SGD", {"lr": 0.1, "nesterov": True}, "ValueError: Nesterov momentum requires a momentum and zero dampening"),
        ("LBFGS", {"lr": 0.1}, "TypeError: LBFGS.step() missing 1 required positional argument: 'closure'"),
        ("SparseAdam", {"lr": 0.1}, "RuntimeError: SparseAdam does not support dense gradients"),
    ],
)
def test_one_of_torch_that_cannot_take_a_step_is_refused(name: str, params: dict[str, Any], reason: str) -> None:
    said = check_error({"optimizer": {"type": name, "params": params}})
    assert said.startswith(f"my.json: optimizer.type='{name}': it cannot take a step with these optimizer.params (")
    assert f"({reason}" in said


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "Rprop"])
def test_the_others_of_torch_pass(name: str) -> None:
    check_optimizer({"optimizer": {"type": name, "params": {"lr": 1e-12}}}, torch.device("cpu"), MINE)


class TestLamb:
    def test_the_first_that_runs_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        usable = {"deepspeed.FusedLamb", "apex.FusedLAMB", "pytorch_optimizer.Lamb"}
        monkeypatch.setattr(optimizers, "unusable_reason", lambda name, device: "" if name in usable else "not here")
        for expected in ("deepspeed.FusedLamb", "apex.FusedLAMB", "pytorch_optimizer.Lamb"):
            assert choose_lamb(CPU) == expected
            usable.remove(expected)
        message = check_error({"optimizer": {"type": "Lamb"}})
        assert "apex.FusedLAMB: not here; " in message
        assert "pip install pytorch-optimizer" in message

    def test_settings_of_another_lamb_are_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        only = "pytorch_optimizer.Lamb"
        monkeypatch.setattr(optimizers, "unusable_reason", lambda name, device: "" if name == only else "not here")
        message = check_error({"optimizer": {"type": "Lamb", "params": {"lr": 1.0, "max_coeff": 5.0}}})
        assert message == (
            "my.json: optimizer.type='Lamb': pytorch_optimizer.Lamb, which is used for it here, has no setting "
            "max_coeff; remove it"
        )

    def test_the_step_is_the_papers(self) -> None:
        """You et al. (2020), algorithm 2, without bias correction: the second step of two."""
        pytest.importorskip("pytorch_optimizer")
        start, lr, decay, eps = torch.tensor([0.3, -0.4, 0.5]), 0.1, 0.01, 1e-6
        parameter = nn.Parameter(start.clone())
        make = client_optimizer(
            {"optimizer": {"type": "pytorch_optimizer.Lamb", "params": {"lr": lr, "weight_decay": decay, "eps": eps}}},
            CPU,
        )
        assert make is not None
        optimizer = make([parameter])
        x, m, v = start.clone(), torch.zeros(3), torch.zeros(3)
        for gradient in (torch.tensor([0.1, 0.2, -0.3]), torch.tensor([-0.2, 0.1, 0.1])):
            parameter.grad = gradient.clone()
            optimizer.step()
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            update = m / (v.sqrt() + eps) + decay * x
            x = x - lr * x.norm() / update.norm() * update
        torch.testing.assert_close(parameter.detach(), x, rtol=1e-5, atol=1e-6)

    def test_the_recipe_for_large_batches_starts_and_resumes(
        self, train: Train, tiny_data: Path, tiny_teacher: Path, tmp_path: Path
    ) -> None:
        if unusable_reason("pytorch_optimizer.Lamb", CPU):
            pytest.skip("needs pytorch-optimizer, the only LAMB that runs on a CPU")
        small = ["student.layers=1", "student.hidden_size=16", "student.num_heads=2", "student.max_positions=32"]
        small += ["train.micro_batch_size=2", "train.gradient_accumulation_steps=3", "train.max_steps=4"]
        small += [f"data.dir={tiny_data}", f"teacher.path={tiny_teacher}"]
        small += ["train.checkpoint_every=2", "train.log_every=1"]
        straight, resumed = tmp_path / "straight", tmp_path / "resumed"
        completed(train(2, ["paper_lamb", *small, f"output_dir={straight}"]))
        assert len(logged_rows(straight)) == 4
        back_to(2, straight, resumed)
        completed(train(2, ["paper_lamb", *small, f"output_dir={resumed}"]))
        assert_same_run(resumed, straight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed's fused Lion runs on this machine's GPU")
def test_lion_without_offload_says_what_to_do_on_a_cpu() -> None:
    assert "set zero_optimization.offload_optimizer.device to cpu" in check_error(
        {"optimizer": {"type": "Lion"}, "zero_optimization": {"stage": 2}}
    )


@pytest.mark.slow
@pytest.mark.timeout(900)  # it is compiled at its first use
def test_lion_offloaded_is_usable_on_a_cpu() -> None:
    check_optimizer({"optimizer": {"type": "Lion"}, "zero_optimization": OFFLOAD}, CPU, MINE)
