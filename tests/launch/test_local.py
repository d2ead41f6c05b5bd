from __future__ import annotations

import pytest
import torch

from dwt_ds.launch.local import launcher_options, visible_ranks


@pytest.mark.parametrize(
    ("gpus", "visible", "ranks", "options"),
    [
        (0, None, 2, ["--num_gpus", "2"]),
        (0, "2,3", 2, ["--num_gpus", "2"]),  # a CPU has no such devices
        (8, None, 8, ["--num_gpus", "8"]),
        (2, "2,3", 2, ["--include", "localhost:2,3"]),
        (4, "4,5,6,7", 2, ["--include", "localhost:4,5"]),
    ],
)
def test_the_launcher_takes_the_devices_that_are_visible(
    gpus: int, visible: str | None, ranks: int, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_ranks(without_gpu=3) == (gpus or 3)
    *_, first, second, port, number = launcher_options(ranks)
    assert [first, second] == options
    assert port == "--master_port"
    assert 1024 <= int(number) < 65536


@pytest.mark.parametrize(("visible", "ranks"), [("0,1", 4), ("GPU-8932f937,GPU-17cc", 2)])
def test_devices_that_deepspeed_cannot_take_are_told(visible: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES='{visible}' with {ranks} ranks: "):
        launcher_options(ranks)
