"""Whether a run can continue a checkpoint, before anything of it is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dwt_ds.base.files import write_manifest
from dwt_ds.config.schema import RunConfig, TrainConfig
from dwt_ds.run.resume import check_length


def test_a_run_shorter_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"files": {}, "state": {"step": 80}})

    def check(**length: Any) -> None:
        train = TrainConfig(**length)
        resolved = SimpleNamespace(config=RunConfig(train=train), total_steps=train.max_steps or 60)
        check_length(tmp_path, resolved)  # type: ignore[arg-type]

    check(max_steps=80)
    with pytest.raises(ValueError, match="is at step 80") as caught:
        check(max_steps=50)
    assert str(caught.value) == (
        f"train.max_steps=50: {tmp_path} is at step 80 of a longer run, this one would have 50; "
        "set train.max_steps=80 or more, or choose another output_dir"
    )
    with pytest.raises(ValueError, match=r"^train.epochs=0.5: .* this one would have 60; set train.max_steps=80 or"):
        check(epochs=0.5)
