"""How many GPUs a run would use."""

from __future__ import annotations

import pytest
from harness.gpus import have_gpus

from dwt_ds.base.gpus import gpu_count


def test_a_run_uses_those_that_torch_counts_unless_deepspeed_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 4)
    assert gpu_count() == 4
    assert gpu_count({"DS_ACCELERATOR": "cpu"}) == 0
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert gpu_count() == 0
    assert gpu_count({}) == 4
    have_gpus(monkeypatch, 0)
    assert gpu_count() == 0
