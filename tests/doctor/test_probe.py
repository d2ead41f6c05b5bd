"""Which GPUs are asked about. Packages called apex that are another package, lack their extensions, or work: real
folders, no CUDA."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harness.gpus import have_gpus

from dwt_ds.doctor import probe
from dwt_ds.doctor.probe import check_apex
from dwt_ds.engine.optimizers import unusable_reason
from dwt_ds.models.layer_norm import why_not_apex

WITHOUT_EXTENSIONS = """
class FusedLayerNorm:
    def __init__(self, *_, **__):
        raise RuntimeError("built without CUDA extensions")
FusedAdam = FusedLAMB = FusedLayerNorm
"""
WORKING = """
from torch.nn import LayerNorm as FusedLayerNorm
from torch.optim import AdamW
class FusedAdam(AdamW):
    pass
class FusedLAMB(AdamW):
    def __init__(self, parameters, max_grad_norm, **settings):
        super().__init__(parameters, **settings)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def make(code: str) -> None:
        for module in ("normalization", "optimizers"):
            (tmp_path / "apex" / module).mkdir(parents=True)
            (tmp_path / "apex" / module / "__init__.py").write_text(code, encoding="utf-8")
        (tmp_path / "apex" / "__init__.py").touch()

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[name]
        unusable_reason.cache_clear()
        why_not_apex.cache_clear()

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield make
    forget()


def test_a_working_one_has_no_problem(install: Callable[[str], None]) -> None:
    install(WORKING)
    assert check_apex() == {"installed": True, "problem": ""}


def test_missing_extensions_are_reported_one_by_one(install: Callable[[str], None]) -> None:
    install(WITHOUT_EXTENSIONS)
    reason = "RuntimeError: built without CUDA extensions"
    problem = f"FusedLayerNorm: {reason}; FusedAdam: {reason}; FusedLAMB: {reason}"
    assert check_apex() == {"installed": True, "problem": problem}


def test_gpus_that_a_run_would_not_use_are_not_asked_about(
    install: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(WORKING)
    asked: list[torch.device] = []
    monkeypatch.setattr("dwt_ds.models.layer_norm.why_not_apex", lambda device: asked.append(device) or "")
    monkeypatch.setattr("dwt_ds.engine.optimizers.unusable_reason", lambda _, device: asked.append(device) or "")
    monkeypatch.setattr(probe, "run", lambda *_: (0, "NVIDIA H100, 570.1, 81559 MiB\n" * 2, ""))
    have_gpus(monkeypatch, 2)
    assert [each["name"] for each in probe._gpus()] == ["NVIDIA H100"] * 2
    check_apex()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert probe._gpus() == []
    check_apex()
    assert [device.type for device in asked] == ["cuda"] * 3 + ["cpu"] * 3


def test_the_other_package_of_that_name_is_reported(install: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    assert check_apex() == {"installed": True, "problem": "not NVIDIA's package"}


def test_a_slow_build_is_not_taken_for_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "run", lambda command, seconds: (124, "", "no answer"))
    [operator] = probe._build_operators()
    assert operator["problem"] == "not built within 900 s"
    assert "less busy" in operator["fix"]
