"""Runs with a hidden loss: what they log, when it ends, and how they resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from harness.ranks import Train
from harness.runs import back_to, rows_of
from safetensors import safe_open

LOSSES = ("loss", "hard_loss", "soft_loss", "hidden_loss", "grad_norm", "eval_hard_loss")
SETTINGS = (
    *("student.layers=3", "train.max_steps=8", "train.log_every=1", "train.eval_every=3", "train.checkpoint_every=2"),
    *("train.keep_last=9", "distill.hidden_weight=0.5"),
    "distill.soft_weight={schedule: linear, start: 4, end: 0, span: 0.5}",
)


def losses_of(run: Path) -> dict[tuple[int, str], float]:
    return {(row["step"], key): row[key] for row in rows_of(run) for key in LOSSES if key in row}


def start(train: Train, recipe: Path, run: Path, settings: Sequence[str], *, ranks: int = 2, code: int = 0) -> str:
    ended, output = train(ranks, [str(recipe), f"output_dir={run}", *SETTINGS, *settings])
    assert ended == code, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_and_its_resumes(stage: int, train: Train, tiny_recipe: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    settings = [f"deepspeed.zero_optimization.stage={stage}", f"teacher.sharded={str(stage == 3).lower()}"]
    run = tmp_path / "run"
    output = start(train, tiny_recipe, run, settings)
    logged = [row for row in rows_of(run) if "hard_loss" in row]
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
            start(train, tiny_recipe, resumed, settings)
        finally:
            if step == 6:
                gone.rename(tiny_teacher)
        assert losses_of(resumed) == losses_of(run)
        exports = [(each / "export" / "model.safetensors").read_bytes() for each in (run, resumed)]
        assert exports[0] == exports[1]


@pytest.mark.slow
def test_a_resume_keeps_to_what_its_run_began_with(
    train: Train, tiny_recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The projection is among what the optimizer trains."""
    run = tmp_path / "run"
    start(train, tiny_recipe, run, ["train.max_steps=4"], ranks=1)
    back_to(2, run, tmp_path / "without")
    output = start(train, tiny_recipe, tmp_path / "without", ["distill.hidden_weight=0"], ranks=1, code=2)
    assert "error: distill.hidden_weight: this run began with a hidden loss, which ends with its teacher; " in output

    plain = tmp_path / "plain"
    start(train, tiny_recipe, plain, ["train.max_steps=4", "distill.hidden_weight=0"], ranks=1)
    back_to(2, plain, tmp_path / "with")
    output = start(train, tiny_recipe, tmp_path / "with", [], ranks=1, code=2)
    assert "error: distill.hidden_weight: this run began with none; " in output

    wide = [f"output_dir={tmp_path / 'wide'}", "teacher.path=null", "distill.hidden_weight=0", "train.max_steps=1"]
    assert train(1, [str(tiny_recipe), *wide])[0] == 0
    back_to(2, run, tmp_path / "other")
    output = start(
        train, tiny_recipe, tmp_path / "other", [f"teacher.path={tmp_path / 'wide' / 'export'}"], ranks=1, code=2
    )
    assert "its hidden states have 32 columns, and this run began with a teacher of 16; choose another" in output
