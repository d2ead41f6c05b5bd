"""How DeepSpeed's operators are compiled: with lists of architectures that torch reads and DeepSpeed alone does not."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import builder
from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder
from torch.utils import cpp_extension

from dwt_ds.engine import ops_check
from dwt_ds.engine.operator_builds import ARCHITECTURES, prepare_operator_builds

Build = Callable[[str], str]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """DeepSpeed's own build of its Adam for a GPU, up to torch's call of the compiler; returns the list it is left."""
    # As with a GPU and nvcc 13.0.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    monkeypatch.setattr(builder, "installed_cuda_version", lambda name="": (13, 0))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "cuda")
    seen: list[str] = []
    monkeypatch.setattr(cpp_extension, "load", lambda **settings: seen.append(os.environ[ARCHITECTURES]))
    monkeypatch.setattr(builder.OpBuilder, "_loaded_ops", {})

    def run(listed: str) -> str:
        monkeypatch.setenv(ARCHITECTURES, listed)
        FusedAdamBuilder().jit_load(verbose=False)
        assert os.environ[ARCHITECTURES] == listed  # the user's own extensions may need the letter
        return seen[-1]

    return run


def test_letters_after_the_number_do_not_stop_deepspeed(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.OpBuilder, "jit_load", builder.OpBuilder.jit_load)  # put back afterwards
    prepare_operator_builds()
    assert build("9.0a") == "9.0+PTX"
    assert build("8.0;9.0a+PTX") == "8.0;9.0+PTX"
    assert build("7.5 8.0+PTX 10.0f 12.0a") == "7.5;8.0+PTX;10.0;12.0"
    assert build(" 9.0;9.0a ") == "9.0+PTX"
    for names in ("Hopper", "8.0;Ada+PTX", "native", ""):
        assert build(names) == "9.0+PTX", names  # that of the device


def test_a_compilation_is_announced_once_a_host(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builder.OpBuilder, "jit_load", builder.OpBuilder.jit_load)  # put back afterwards
    prepare_operator_builds()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    load = cpp_extension.load
    operator = tmp_path / "fused_adam" / "fused_adam.so"
    operator.parent.mkdir()

    def announced() -> bool:
        build("8.0")
        assert cpp_extension.load is load
        return "compiling fused_adam for this machine, once; it takes a minute or more\n" in capsys.readouterr().err

    assert announced()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not announced()
    monkeypatch.delenv("LOCAL_RANK")
    operator.touch()
    assert not announced(), "it is only loaded"
    operator.unlink()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert not announced(), "there is no nvcc"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert announced(), "a CPU needs none"


def test_a_folder_that_cannot_be_written_to_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As for a container's user without a home."""
    here = tmp_path / "extensions"

    def load(**settings: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(here))

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(builder.OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(builder.OpBuilder, "jit_load", builder.OpBuilder.jit_load)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(here))
    prepare_operator_builds()
    [answer] = ops_check.build_operators()
    assert answer["name"] == "cpu_adam"
    assert answer["problem"].endswith(f"cannot be compiled here ([Errno 13] Permission denied: '{here}')")
    assert answer["fix"] == f"set TORCH_EXTENSIONS_DIR to a folder that can be written to, in place of {here}"


def test_programs_of_this_environment_come_first_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.OpBuilder, "jit_load", builder.OpBuilder.jit_load)
    monkeypatch.setenv("PATH", "/usr/bin")
    for _ in range(2):
        prepare_operator_builds()
        assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
