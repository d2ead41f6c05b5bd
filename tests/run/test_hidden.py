"""Runs with a hidden loss: what they log, when it ends, and how they resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.runs import assert_same_run, back_to, logged_rows
from harness.tiny import TinyRun
from safetensors import safe_open

SETTINGS = (
    *("student.layers=3", "train.max_steps=8", "train.log_every=1", "train.eval_every=3", "train.checkpoint_every=2"),
    *("train.keep_last=9", "distill.hidden_weight=0.5"),
    "distill.soft_weight={schedule: linear, start: 4, end: 0, span: 0.5}",
)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_and_its_resumes(stage: int, tiny_run: TinyRun, tiny_teacher: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, f"deepspeed.zero_optimization.stage={stage}", f"teacher.sharded={str(stage == 3).lower()}"]
    run = tmp_path / "run"
    output = tiny_run(run, *settings, ranks=2)
    logged = list(logged_rows(run).values())
    for row in logged[:4]:
        assert 0 < row["hidden_loss"] < 2
        soft = row["soft_loss"] + 0.5 * row["hidden_loss"]
        assert row["loss"] == pytest.approx(row["hard_loss"] + row["soft_weight"] * soft, rel=1e-5)
    assert f" + 2 x hidden {logged[0]['hidden_loss']:.4f}  " in output
    assert logged[2]["hidden_loss"] < logged[0]["hidden_loss"]
    assert [row["step"] for row in logged if "hidden_loss" in row] == [1, 2, 3, 4], "it ends with the teacher"
    assert "positions + 0.5 w x hidden loss; w:" in (run / "export" / "README.md").read_text()
    with safe_open(run / "export" / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "projection" in name]  # noqa: SIM118
    for step in (2, 6):
        resumed = tmp_path / f"from_{step}"
        back_to(step, run, resumed)
        gone = tmp_path / "gone"
        if step == 6:
            tiny_teacher.rename(gone)
        try:
            tiny_run(resumed, *settings, ranks=2)
        finally:
            if step == 6:
                gone.rename(tiny_teacher)
        assert_same_run(resumed, run)


@pytest.mark.slow
def test_a_resume_keeps_to_what_its_run_began_with(tiny_run: TinyRun, tmp_path: Path) -> None:
    """The projection is among what the optimizer trains."""
    run, settings = tmp_path / "run", [*SETTINGS, "train.max_steps=4"]
    tiny_run(run, *settings)
    back_to(2, run, tmp_path / "without")
    output = tiny_run(tmp_path / "without", *SETTINGS, "distill.hidden_weight=0", code=2)
    assert "error: distill.hidden_weight: this run began with a hidden loss, which ends with its teacher; " in output

    plain = tmp_path / "plain"
    tiny_run(plain, *settings, "distill.hidden_weight=0")
    back_to(2, plain, tmp_path / "with")
    output = tiny_run(tmp_path / "with", *SETTINGS, code=2)
    assert "error: distill.hidden_weight: this run began with none; " in output

    tiny_run(tmp_path / "wide", "teacher.path=null", "train.max_steps=1")
    back_to(2, run, tmp_path / "other")
    output = tiny_run(tmp_path / "other", *SETTINGS, f"teacher.path={tmp_path / 'wide' / 'export'}", code=2)
    assert "its hidden states have 32 columns, and this run began with a teacher of 16; choose another" in output
