"""GPUs that only torch's counts have."""

from __future__ import annotations

import pytest
import torch


def have_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A machine on which torch counts so many GPUs, and an environment that does not keep a run from them."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
