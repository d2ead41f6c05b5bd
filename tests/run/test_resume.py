"""Whether a run can continue a checkpoint, and what a start from one leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness.runs import back_to

from dwt_ds.config.schema import RunConfig, TrainConfig
from dwt_ds.engine.checkpoint.manifest import NewestCheckpoint
from dwt_ds.run.resume import check_can_resume

WITHOUT_GROWTH = """
import sys
from dwt_ds.pretrain import main
from dwt_ds.run import models
models.grow = models.load_masked_lm = None
sys.exit(main())
"""
AT_80 = NewestCheckpoint(Path("step_00000080"), [], {"world_size": 2, "state": {"step": 80}})


def check(checkpoint: NewestCheckpoint = AT_80, *, ranks: int = 2, stage: int = 2, **length: Any) -> None:
    train = TrainConfig(**length)
    settings = {"config": RunConfig(train=train), "total_steps": train.max_steps or 60}
    resolved = SimpleNamespace(**settings, world_size=ranks, ds=SimpleNamespace(zero_stage=stage))
    check_can_resume(checkpoint, resolved)  # type: ignore[arg-type]


def test_a_run_shorter_than_its_checkpoint_is_refused() -> None:
    check(max_steps=80)
    check(NewestCheckpoint(None, [], {}), max_steps=50)
    with pytest.raises(ValueError, match="is at step 80") as caught:
        check(max_steps=50)
    assert str(caught.value) == (
        "train.max_steps=50: step_00000080 is at step 80 of a longer run, this one would have 50; "
        "set train.max_steps=80 or more, or choose another output_dir"
    )
    with pytest.raises(ValueError, match=r"^train.epochs=0.5: .* this one would have 60; set train.max_steps=80 or"):
        check(epochs=0.5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_1_and_2_alone_resume_on_another_number_of_ranks(stage: int) -> None:
    check(max_steps=80, stage=stage)
    if stage in (1, 2):
        check(max_steps=80, stage=stage, ranks=4)
        return
    with pytest.raises(ValueError, match="^step_00000080 was written by 2 ranks, this run has 4: .* start it with 2$"):
        check(max_steps=80, stage=stage, ranks=4)


def test_a_student_is_grown_once(train: Callable[..., tuple[int, str]], tiny_recipe: Path, tmp_path: Path) -> None:
    """A checkpoint replaces all that a resume would grow, from weights of the teacher that it would load once more."""
    settings = ["train.max_steps=4", "train.log_every=1", "train.checkpoint_every=2", "train.keep_last=9"]
    settings += ["student.init=stack", "student.hidden_size=16", "student.intermediate_size=32"]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    code, output = train(1, [str(tiny_recipe), f"output_dir={run}", *settings])
    assert code == 0, output
    back_to(2, run, resumed)
    program = ("-c", WITHOUT_GROWTH)
    code, output = train(1, [str(tiny_recipe), f"output_dir={resumed}", *settings], program=program)
    assert code == 0, output
    assert "at step 2" in output
    exports = [(each / "export" / "model.safetensors").read_bytes() for each in (run, resumed)]
    assert exports[0] == exports[1]
    code, output = train(1, [str(tiny_recipe), f"output_dir={tmp_path / 'new'}", *settings], program=program)
    assert code != 0, "a new run does grow"
