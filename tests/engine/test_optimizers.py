"""Which optimizers run here, what is said of those that do not, and that a resumed Adam goes on to the last bit.

What takes a step under DeepSpeed does it in one process without the launcher. apex is stood in for by modules made
here; with the real one, on a GPU, the last tests run it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port

from dwt_ds.config.recipe import load_recipe
from dwt_ds.engine import optimizers
from dwt_ds.engine.ds_json.load import load_ds_json
from dwt_ds.engine.ds_json.origin import Origin
from dwt_ds.engine.optimizers import (
    check_optimizer,
    check_optimizer_and_stage,
    choose_lamb,
    client_optimizer,
    replay_adam_steps,
    unusable_reason,
)

Launch = Callable[..., tuple[int, str]]

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


def install_apex(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    """Puts a package apex in place; without attributes, the one from the Python index, which has no optimizers."""
    apex = types.ModuleType("apex")
    monkeypatch.setitem(sys.modules, "apex", apex)
    if not attributes:
        monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
        return
    fused = types.ModuleType("apex.optimizers")
    vars(fused).update(attributes)
    monkeypatch.setitem(sys.modules, "apex.optimizers", fused)
    apex.optimizers = fused  # type: ignore[attr-defined]


def check_error(ds_values: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        check_optimizer(ds_values, CPU, MINE)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestApex:
    def test_a_usable_one_is_constructed_with_the_settings_of_the_json(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_apex(monkeypatch, FusedAdam=FakeFused, FusedLAMB=FakeFused)
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
    def test_its_absence_is_told_with_what_to_build(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "apex", None)
        message = check_error({"optimizer": {"type": name}})
        assert message.startswith(f"my.json: optimizer.type={name!r} is not usable here (ModuleNotFoundError")
        assert "build NVIDIA's apex from source" in message
        assert "APEX_CUDA_EXT=1" in message

    def test_the_other_package_of_that_name_is_not_mistaken_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_apex(monkeypatch)
        message = check_error({"optimizer": {"type": "apex.FusedAdam"}})
        assert "is not usable here" in message
        assert "the package called apex on the Python index is another project" in message

    def test_one_without_its_cuda_extension_is_found_out_by_constructing_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def without_extension(*_: Any, **__: Any) -> None:
            raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

        install_apex(monkeypatch, FusedAdam=without_extension)
        assert "(RuntimeError: apex.optimizers.FusedAdam requires cuda extensions)" in check_error(
            {"optimizer": {"type": "apex.FusedAdam"}}
        )

    @pytest.mark.parametrize("wrong", [0.0, float("nan")])
    def test_one_whose_step_is_wrong_is_found_out_by_running_it(
        self, wrong: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(params: Any, lr: float, **_: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD([{"params": params, "lr": torch.tensor(lr * wrong).item()}], lr=lr)

        install_apex(monkeypatch, FusedAdam=broken)
        assert "did not change a parameter" in check_error({"optimizer": {"type": "apex.FusedAdam"}})

    def test_offloaded_state_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_apex(monkeypatch, FusedAdam=FakeFused)
        assert "does not work on offloaded state" in check_error(
            {"optimizer": {"type": "apex.FusedAdam"}, "zero_optimization": OFFLOAD}
        )

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
    assert "set zero_allow_untested_optimizer to true" in check_error(values)
    check_optimizer({**values, "zero_allow_untested_optimizer": True}, CPU, MINE)
    check_optimizer({**values, "zero_optimization": {"stage": 0}}, CPU, MINE)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": {"type": "Lamb"}, "zero_optimization": {"stage": 1}}, "set the stage to 0"),
        ({"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 2}}, "zero_allow_untested_optimizer to true"),
        ({"optimizer": {"type": "apex.FusedAdam"}, "zero_optimization": OFFLOAD}, "not work on offloaded state"),
    ],
)
def test_what_no_device_can_do_is_told_without_one(
    values: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_device(*_: Any) -> str:
        raise AssertionError("a device was asked")

    monkeypatch.setattr(optimizers, "unusable_reason", no_device)
    with pytest.raises(ValueError, match=f"^my.json: optimizer.type=.*{words}") as caught:
        check_optimizer_and_stage(values, MINE)
    assert check_error(values) == str(caught.value)
    check_optimizer_and_stage({"optimizer": {"type": "AdamW"}, "zero_optimization": OFFLOAD}, MINE)
    check_optimizer_and_stage({"optimizer": {"type": "Lamb"}}, MINE)


class TestLamb:
    @pytest.mark.parametrize("name", ["Lamb", "apex.FusedLAMB", "pytorch_optimizer.Lamb"])
    def test_it_is_refused_under_zero_whose_pieces_have_no_layers(self, name: str) -> None:
        message = check_error({"optimizer": {"type": name}, "zero_optimization": {"stage": 2}})
        assert "zero_optimization.stage=2" in message
        assert "set the stage to 0" in message

    def test_the_first_that_runs_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        usable = {"deepspeed.FusedLamb", "apex.FusedLAMB", "pytorch_optimizer.Lamb"}
        monkeypatch.setattr(optimizers, "unusable_reason", lambda name, device: "" if name in usable else "not here")
        for expected in ("deepspeed.FusedLamb", "apex.FusedLAMB", "pytorch_optimizer.Lamb"):
            assert choose_lamb(CPU) == expected
            usable.remove(expected)
        message = check_error({"optimizer": {"type": "Lamb"}})
        assert "apex.FusedLAMB: not here; " in message
        assert "pip install pytorch-optimizer" in message

    def test_settings_of_another_lamb_are_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
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
        self, train: Launch, tiny_data: Path, tiny_teacher: Path, tmp_path: Path
    ) -> None:
        if unusable_reason("pytorch_optimizer.Lamb", CPU):
            pytest.skip("needs pytorch-optimizer, the only LAMB that runs on a CPU")
        small = ["student.layers=1", "student.hidden_size=16", "student.num_heads=2", "student.max_positions=32"]
        small += ["train.micro_batch_size=2", "train.gradient_accumulation_steps=3", "train.max_steps=4"]
        small += [f"data.dir={tiny_data}", f"teacher.path={tiny_teacher}", f"output_dir={tmp_path}"]
        small += ["train.checkpoint_every=2", "train.log_every=1"]
        code, output = train(2, ["paper_lamb", *small])
        assert code == 0, output
        rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
        straight = [(row["step"], row["loss"]) for row in map(json.loads, rows) if "loss" in row]
        assert len(straight) == 4
        (tmp_path / "complete.json").unlink()
        shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
        code, output = train(2, ["paper_lamb", *small])
        assert code == 0, output
        rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [(row["step"], row["loss"]) for row in map(json.loads, rows) if "loss" in row] == straight

    def test_the_recipe_asks_for_stage_0_and_a_large_batch(self) -> None:
        config = load_recipe("paper_lamb").config
        ds = load_ds_json(config.deepspeed_config, config.deepspeed)
        assert (ds.zero_stage, ds.values["optimizer"]["type"]) == (0, "Lamb")
        assert config.train.micro_batch_size * config.train.gradient_accumulation_steps * 8 == 8192


# Runs in a process of its own: DeepSpeed keeps state for a process, and the ranks' environment must not stay behind.
STEPS = """
import json, sys
import torch
from torch import nn
from dwt_ds.base.quiet import quieten_libraries
quieten_libraries()
from dwt_ds.engine import ranks
from dwt_ds.engine.student import quieten_deepspeed, start_student
quieten_deepspeed()
ranks.start_ranks()
for name, optimizer, zero in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    values = {
        "train_batch_size": 2, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0,
        "optimizer": optimizer, "zero_optimization": zero,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}},
    }
    engine = start_student(model, values)
    losses = []
    for _ in range(3):
        loss = engine(torch.ones(2, 8, device=ranks.device())).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    print(json.dumps([name, type(engine.basic_optimizer).__name__, losses]), flush=True)
"""

# Case -> optimizer section, ZeRO section, the class that DeepSpeed takes on a CPU.
ON_A_CPU: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "Adam": ({"type": "Adam", "params": {"lr": 0.01, "adam_w_mode": False}}, {"stage": 2}, "Adam"),
    "AdamW": ({"type": "AdamW", "params": {"lr": 0.01}}, {"stage": 1}, "AdamW"),
    "AdamW offloaded": ({"type": "AdamW", "params": {"lr": 0.01}}, OFFLOAD, "DeepSpeedCPUAdam"),
    "Adagrad": ({"type": "Adagrad", "params": {"lr": 0.01}}, {"stage": 2}, "Adagrad"),
    "Muon": ({"type": "Muon", "params": {"lr": 0.01}}, {"stage": 2}, "MuonWithAuxAdam"),
    "torch's AdamW": ({"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}, {"stage": 2}, "AdamW"),
    "Lamb": ({"type": "Lamb", "params": {"lr": 0.01}}, {"stage": 0}, "Lamb"),
}

# Those that have CUDA kernels of DeepSpeed's own.
ON_A_GPU: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "AdamW": ({"type": "AdamW", "params": {"lr": 0.01}}, {"stage": 2}, "FusedAdam"),
    "AdamW offloaded": ({"type": "AdamW", "params": {"lr": 0.01}}, OFFLOAD, "DeepSpeedCPUAdam"),
    "Lion": ({"type": "Lion", "params": {"lr": 0.01}}, {"stage": 2}, "FusedLion"),
    "Muon": ({"type": "Muon", "params": {"lr": 0.01}}, {"stage": 2}, "MuonWithAuxAdam"),
    "Lamb": ({"type": "Lamb", "params": {"lr": 0.01}}, {"stage": 0}, "FusedLamb"),
}


def run_steps(
    cases: dict[str, tuple[dict[str, Any], dict[str, Any], str]], *, on_gpu: bool = False, timeout_seconds: float = 800
) -> dict[str, tuple[str, list[float]]]:
    device = {"CUDA_VISIBLE_DEVICES": "0"} if on_gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    settings = {**device, "OMP_NUM_THREADS": "1", "RANK": "0"}
    settings |= {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    asked = json.dumps([[name, optimizer, zero] for name, (optimizer, zero, _) in cases.items()])
    done = subprocess.run(
        [sys.executable, "-c", STEPS, asked],
        env={**os.environ, **settings, "MASTER_PORT": str(get_free_port())},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    return {name: (kind, losses) for name, kind, losses in rows}


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first use of an optimizer compiles it
def test_deepspeeds_optimizers_learn_on_a_cpu() -> None:
    cases = dict(ON_A_CPU)
    if unusable_reason("pytorch_optimizer.Lamb", CPU):
        del cases["Lamb"]
    done = run_steps(cases)
    assert {name: kind for name, (kind, _) in done.items()} == {name: kind for name, (_, _, kind) in cases.items()}
    for name, (_, losses) in done.items():
        assert losses[2] < losses[1] < losses[0], name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.slow
@pytest.mark.timeout(900)  # as above
def test_deepspeeds_optimizers_learn_on_a_gpu() -> None:
    done = run_steps(ON_A_GPU, on_gpu=True)
    assert {name: kind for name, (kind, _) in done.items()} == {name: kind for name, (_, _, kind) in ON_A_GPU.items()}
    for name, (_, losses) in done.items():
        assert losses[2] < losses[1] < losses[0], name


@pytest.mark.slow
@pytest.mark.timeout(1800)  # both are compiled at their first use
def test_lion_and_adagrad_learn_offloaded() -> None:
    section = {"params": {"lr": 0.01}}
    done = run_steps(
        {
            "Lion": ({"type": "Lion", **section}, OFFLOAD, ""),
            "Adagrad": ({"type": "Adagrad", **section}, OFFLOAD, ""),
        },
        timeout_seconds=1700,
    )
    assert [kind for kind, _ in done.values()] == ["DeepSpeedCPULion", "DeepSpeedCPUAdagrad"]
    for name, (_, losses) in done.items():
        assert losses[2] < losses[0], name


@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed's fused Lion runs on this machine's GPU")
def test_lion_without_offload_says_what_to_do_on_a_cpu() -> None:
    assert "set zero_optimization.offload_optimizer.device to cpu" in check_error(
        {"optimizer": {"type": "Lion"}, "zero_optimization": {"stage": 2}}
    )
    check_optimizer({"optimizer": {"type": "Lion"}, "zero_optimization": OFFLOAD}, CPU, MINE)


@pytest.mark.slow  # it is compiled at its first use
def test_a_resumed_cpu_adam_repeats_its_steps_to_the_last_bit() -> None:
    """31 steps, and 26 of them again by an optimizer that loaded the state of step 5."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    generator = torch.Generator().manual_seed(3)
    start = torch.randn(64, generator=generator)
    gradients = torch.randn(31, 64, generator=generator)

    def make(values: torch.Tensor) -> torch.optim.Optimizer:
        return DeepSpeedCPUAdam([nn.Parameter(values.clone())], lr=0.01, weight_decay=0.01)

    def walk(optimizer: torch.optim.Optimizer, steps: range) -> torch.Tensor:
        parameter = optimizer.param_groups[0]["params"][0]
        for step in steps:
            parameter.grad = gradients[step].clone()
            optimizer.step()
        return parameter.detach().clone()

    first = make(start)
    middle = walk(first, range(5))
    saved = first.state_dict()
    saved["state"] = {
        key: {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        for key, state in saved["state"].items()
    }
    straight = walk(first, range(5, 31))

    walk(make(start), range(3))  # whatever else went through the same C++ object
    resumed = make(middle)
    resumed.load_state_dict(saved)
    replay_adam_steps(resumed)
    assert torch.equal(walk(resumed, range(5, 31)), straight)


needs_apex = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(unusable_reason("apex.FusedAdam", torch.device("cuda"))),
    reason="needs NVIDIA's apex with its CUDA extensions, and a GPU",
)


@needs_apex
@pytest.mark.parametrize("name", ["apex.FusedAdam", "apex.FusedLAMB"])
def test_the_real_apex_takes_a_step_like_the_reference(name: str) -> None:
    gpu = torch.device("cuda")
    start = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = (nn.Parameter(start.clone().to(gpu)) for _ in range(2))
    params = {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.0}
    make = client_optimizer({"optimizer": {"type": name, "params": params}}, gpu)
    assert make is not None
    optimizer, reference = make([ours]), torch.optim.AdamW([theirs], lr=0.01, eps=1e-6, weight_decay=0.0)
    for parameter in (ours, theirs):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    reference.step()
    if name == "apex.FusedAdam":
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    else:
        assert torch.isfinite(ours).all()
        assert (ours < start.to(gpu)).all()


@needs_apex
def test_the_real_apex_trains_under_zero_2(launch: Launch, tiny_recipe: Path, tmp_path: Path) -> None:
    on_gpu = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"}
    settings = [f"output_dir={tmp_path}", "deepspeed.optimizer.type=apex.FusedAdam"]
    code, text = launch(1, [str(tiny_recipe), *settings], environment=on_gpu, timeout_seconds=300)
    assert code == 0, text
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["deepspeed"]["optimizer"]["type"] == "apex.FusedAdam"
