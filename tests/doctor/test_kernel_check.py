"""The check of the loss: that it passes, and that it would notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import dwt_kernels
import pytest
import torch
from dwt_kernels import DistillLoss
from harness.gpus import have_gpus

from dwt_ds.doctor import kernel_check
from dwt_ds.doctor.kernel_check import check_device

OURS = dwt_kernels.linear_distill_loss


def test_the_torch_back_end_is_right_in_both_dtypes() -> None:
    answer = check_device("cpu", "torch")
    assert answer["problem"] == ""
    assert (answer["device"], answer["backend"]) == ("cpu", "torch")
    assert answer["errors"]["fp32"] < 1e-5
    assert 1e-5 < answer["errors"]["bf16"] < 0.03


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own check does this, compiled")
@pytest.mark.slow
def test_the_triton_back_end_is_right_in_both_forms() -> None:
    pytest.importorskip("triton")
    code = (
        "import json; from dwt_ds.doctor.kernel_check import check_device as c; print(json.dumps(c('cpu', 'triton')))"
    )
    # Triton has to be told before it is first imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert answer["problem"] == "", done.stderr
    assert answer["backend"] == "triton"
    assert set(answer["errors"]) == {"fp32", "bf16"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_right() -> None:
    answer = kernel_check.check_kernels()[0]
    assert (answer["device"], answer["backend"], answer["problem"]) == ("cuda:0", "triton", "")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_loss_that_is_wrong_in_one_dtype_fails(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def wrong(hidden: Any, *arguments: Any, **keywords: Any) -> DistillLoss:
        keywords["temperature"] *= 1.5 if hidden.dtype == kind else 1.0
        return OURS(hidden, *arguments, **keywords)

    monkeypatch.setattr(dwt_kernels, "linear_distill_loss", wrong)
    problem = check_device("cpu", "torch")["problem"]
    assert problem.startswith(f"chunked in {dtype}: off by ")
    assert ";" not in problem


@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_one_gradient_that_is_not_finite_fails(tensor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*arguments: Any, **keywords: Any) -> DistillLoss:
        result = OURS(*arguments, **keywords)
        # Its value is 0 and its gradient is not finite.
        return result._replace(loss=result.loss + (arguments[tensor] * 0).abs().sqrt().sum())

    monkeypatch.setattr(dwt_kernels, "linear_distill_loss", spoiled)
    assert "chunked in fp32: off by nan" in check_device("cpu", "torch")["problem"]


def test_whatever_a_compiler_raises_is_reported_for_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, memory: str, **keywords: Any) -> DistillLoss:
        raise RuntimeError(f"no {memory} today\nand more\nand ever more")

    monkeypatch.setattr(dwt_kernels, "linear_distill_loss", broken)
    problem = check_device("cpu", "triton")["problem"]
    assert problem.startswith(
        "chunked in fp32: RuntimeError: no chunked today and more; logit_free in fp32: RuntimeError: no"
    )
    assert "ever" not in problem


def test_a_gpu_without_triton_is_checked_with_what_a_run_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    have_gpus(monkeypatch, 1)
    monkeypatch.setattr(kernel_check, "check_device", lambda *both: asked.append(both))
    for spec in (object(), None):
        monkeypatch.setattr(kernel_check, "find_spec", lambda name, spec=spec: spec)
        kernel_check.check_kernels()
    assert asked == [("cuda:0", "triton"), ("cuda:0", "torch")]


def test_a_gpu_that_a_run_would_not_use_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(kernel_check, "check_device", lambda *both: both)
    assert kernel_check.check_kernels() == [("cpu", "torch")]
