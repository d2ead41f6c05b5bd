"""Jobs over several devices; a variable of the environment holds a worker's device."""

from __future__ import annotations

import operator
import os
from pathlib import Path

import pytest
import torch
from harness.gpus import have_gpus

from dwt_ds.glue import devices
from dwt_ds.glue.devices import share_cores, spread, visible_gpus
from dwt_ds.glue.finetune import _training_arguments
from dwt_ds.glue.options import FineTuning


@pytest.mark.slow  # two processes load torch and Transformers
def test_a_process_for_each_gpu() -> None:
    jobs = [("CUDA_VISIBLE_DEVICES",), ("CUDA_VISIBLE_DEVICES",), ("TOKENIZERS_PARALLELISM",)]
    results = dict(spread(os.getenv, jobs, ["gpu-a", "gpu-b"]))
    assert sorted(results) == [0, 1, 2]
    assert {results[0], results[1]} <= {"gpu-a", "gpu-b"}
    assert results[2] == "false"


def test_one_job_that_fails_does_not_end_the_others() -> None:
    results = dict(spread(operator.truediv, [(1, 0), (1, 2)], ["only one"]))
    assert isinstance(results[0], ZeroDivisionError)
    assert results[1] == 0.5


def test_nothing_to_do() -> None:
    assert list(spread(os.getenv, [], ["a", "b"])) == []


def test_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert visible_gpus() == ["5", "GPU-7"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert visible_gpus() == []
    have_gpus(monkeypatch, 0)
    assert visible_gpus() == []


def test_fine_tuning_leaves_gpus_alone_that_a_run_would_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_gpus(monkeypatch, 2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert _training_arguments(str(tmp_path), 3, 0, FineTuning()).use_cpu


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    share_cores(1)
    share_cores(3)
    share_cores(20)
    assert given == [8, 2, 1]


def test_a_dead_worker_is_an_error_of_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_start_worker", print)  # it dies without loading torch
    (outcome,) = dict(spread(os._exit, [(3,)], ["a", "b"])).values()
    assert "terminated abruptly" in str(outcome)
