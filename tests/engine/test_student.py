"""Checks before the student is handed to DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dwt_ds.base.locks import release_locks
from dwt_ds.engine import student
from dwt_ds.engine.ds_json.load import load_ds_json
from dwt_ds.engine.student import check_monitors, occupy_nvme


@pytest.mark.parametrize(
    ("section", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")]
)
def test_a_monitor_whose_package_is_missing_is_refused_before_the_run(
    section: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed would raise on rank 0 alone, while the others wait."""
    installed = {"tensorboard", "wandb", "comet_ml"}
    monkeypatch.setattr(student, "find_spec", lambda name: name if name in installed else None)

    def check(**monitors: Any) -> None:
        check_monitors(load_ds_json("zero1", monitors))

    check(**{section: {"enabled": True}})
    installed.remove(package)
    check()
    check(**{section: {"enabled": False}}, csv_monitor={"enabled": True})
    with pytest.raises(ValueError, match=f"^deepspeed.{section}.enabled=true: {package} is not installed; pip install"):
        check(**{section: {"enabled": True}})


def test_parameters_on_nvme_need_libaio_and_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed would stop with a traceback, or remove another run's parameters."""
    offload = {"offload_param": {"device": "nvme", "nvme_path": str(tmp_path / "nvme")}}
    ds = load_ds_json("zero1", {"zero_optimization": {"stage": 3, **offload}})
    monkeypatch.setattr(student.AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    place = "deepspeed.zero_optimization.offload_param"
    with pytest.raises(ValueError, match=f"^{place}.device=nvme: .* install them .Debian: libaio-dev., or set it to"):
        occupy_nvme(ds)
    occupy_nvme(load_ds_json("zero1", {"zero_optimization": {"stage": 2, **offload}}))  # not read there
    assert not (tmp_path / "nvme").exists()
    monkeypatch.setattr(student.AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    try:
        occupy_nvme(ds)
        with pytest.raises(ValueError, match=f"^{place}.nvme_path='{tmp_path}/nvme': .* writes there already"):
            occupy_nvme(ds)
    finally:
        release_locks()
