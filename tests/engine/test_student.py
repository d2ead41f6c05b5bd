"""Checks before the student is handed to DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest

from dwt_ds.engine import student
from dwt_ds.engine.ds_json.load import load_ds_json
from dwt_ds.engine.student import check_monitors


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
