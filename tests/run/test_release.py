"""Runs whose teacher leaves before the end: on two ranks, after a resume, without the teacher's folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness.ranks import Run
from harness.runs import assert_same_run, back_to, logged_rows, rows_of, values_of
from harness.tiny import TinyRun
from safetensors.torch import load_file, save_file

from dwt_ds.cli.main import main
from dwt_ds.config.objective import DistillConfig, Schedule
from dwt_ds.config.schema import RunConfig, TeacherConfig
from dwt_ds.engine.checkpoint.manifest import RunState
from dwt_ds.run.soft_weight import SoftWeight

LOSSES = ("loss", "hard_loss", "soft_weight", "grad_norm", "eval_hard_loss")


@pytest.mark.slow
def test_the_teacher_leaves_when_its_weight_is_0(tiny_run: TinyRun, tiny_teacher: Path, tmp_path: Path) -> None:
    """With a sharded teacher and a student grown from it."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    settings = [
        *("train.max_steps=12", "train.log_every=4", "train.eval_every=3", "train.checkpoint_every=4"),
        *("train.keep_last=9", f"teacher.path={folder}", "student.init=stack"),
        *("student.hidden_size=16", "student.intermediate_size=32"),
        "distill.soft_weight={schedule: linear, start: 4, end: 0, span: 0.5}",
    ]
    kept, run = tmp_path / "kept", tmp_path / "run"
    tiny_run(kept, *settings, "teacher.release=never", ranks=2)
    output = tiny_run(run, *settings, "teacher.sharded=true", ranks=2)
    assert output.count("step 6/12  teacher released") == 1
    expected, found = values_of(kept, *LOSSES), values_of(run, *LOSSES)
    assert {key for key in found if key[0] != 6 or key[1].startswith("eval")} == set(expected)
    assert [found[key] for key in expected] == pytest.approx(list(expected.values()), abs=1e-6)
    rows = rows_of(run)
    active = {step: row["teacher_active"] for step, row in logged_rows(run).items()}
    assert active == {1: True, 4: True, 6: True, 8: False, 12: False}
    assert [row["soft_loss"] for row in rows if row["step"] > 6 and "hard_loss" in row] == [0.0, 0.0]
    assert [row["step"] for row in rows if "eval_soft_loss" in row] == [3]
    assert [row["step"] for row in rows_of(kept) if "eval_soft_loss" in row] == [3, 6, 9, 12]
    assert all(row["teacher_active"] for row in logged_rows(kept).values())
    card = (run / "export" / "README.md").read_text()
    assert "| teacher | released at step 6 |" in card
    assert "released" not in (kept / "export" / "README.md").read_text().split("Settings, as resolved")[0]

    before = tmp_path / "before"
    back_to(4, run, before, teacher_loss="missing", teacher_released="missing")  # as an earlier version wrote it
    again = tiny_run(before, *settings, "teacher.sharded=true", ranks=2)
    measured = next(line for line in output.splitlines() if line.startswith("teacher:"))
    assert measured in again.splitlines()
    assert_same_run(before, run)

    folder.rename(tmp_path / "gone")
    after = tmp_path / "after"
    back_to(8, run, after)
    again = tiny_run(after, *settings, "teacher.sharded=true", ranks=2)
    assert f"teacher: {folder}, released at step 6, not loaded" in again
    assert_same_run(after, run)
    again = (after / "export" / "README.md").read_text()
    of_teacher = [line for line in card.splitlines() if line.startswith("| teacher")]
    assert [line for line in again.splitlines() if line.startswith("| teacher")] == of_teacher
    assert len(of_teacher) == 2, "its weights' origin, and where it was released"
    checkpoint = next((run / "checkpoints").glob("step_*8"))
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "exported")]) == 0
    assert "| teacher | released at step 6 |" in (tmp_path / "exported" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("end", [0, 0.9])
def test_the_teacher_leaves_when_the_adaptive_weight_has_been_low(
    end: float, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """The untrained student is better than the teacher of random weights from its first step on."""
    settings = [
        *("train.max_steps=24", "train.log_every=7", "train.checkpoint_every=10", "train.keep_last=9"),
        f"distill.soft_weight={{schedule: adaptive, start: 4, end: {end}, signal: gap, width: 0.01}}",
        *("teacher.release_after_steps=12", f"teacher.release_below_share={0.25 if end else 0.01}"),
    ]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    output = tiny_run(run, *settings)
    assert "step 20/24  teacher released" in output
    active = {step: row["teacher_active"] for step, row in logged_rows(run).items()}
    assert active == {1: True, 7: True, 14: True, 20: True, 21: False, 24: False}
    weights = {step: row["soft_weight"] for step, row in logged_rows(run).items()}
    assert weights == pytest.approx({1: 4, 7: end, 14: end, 20: end, 21: 0, 24: 0})
    # The teacher's loss is not measured again.
    back_to(10, run, resumed, teacher_loss=1.25)
    assert "held-out MLM loss 1.2500" in tiny_run(resumed, *settings)
    assert_same_run(resumed, run)
    # With the same settings it stays away, and other ones bring it back.
    for name, changed, returns in (("same", [], False), ("other", ["distill.soft_weight.start=3"], True)):
        back_to(20, run, tmp_path / name)
        output = tiny_run(tmp_path / name, *settings, *changed)
        assert ("held-out MLM loss" in output) == returns
        assert {row["teacher_active"] for row in rows_of(tmp_path / name)[-2:] if "hard_loss" in row} == {returns}


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["teacher", "masks"])
def test_another_teacher_or_mask_is_measured_and_the_weight_begins_anew(
    changed: str, tiny_run: TinyRun, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Weighed by what the first teacher's losses were, a better one would not be listened to."""
    other = shutil.copytree(tiny_teacher, tmp_path / "other")
    weights = {name: 0.5 * weight for name, weight in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    settings = [
        *("train.max_steps=8", "train.log_every=1", "train.checkpoint_every=4", "train.keep_last=9"),
        "distill.soft_weight={schedule: adaptive, start: 4, signal: gap, width: 0.01}",
    ]
    tiny_run(run, *settings, ranks=2)
    assert logged_rows(run)[5]["soft_weight"] < 1, "the student is better than this teacher"
    back_to(4, run, resumed, teacher_loss=1.25)
    settings += [f"teacher.path={other}" if changed == "teacher" else "data.mask_probability=0.3"]
    output = tiny_run(resumed, *settings, ranks=2)
    assert "held-out MLM loss" in output
    assert "held-out MLM loss 1.2500" not in output
    assert logged_rows(resumed)[5]["soft_weight"] == 4


@pytest.mark.slow
def test_a_sharded_teacher_leaves_a_student_under_zero_3(tiny_run: TinyRun, tmp_path: Path) -> None:
    settings = [
        *("deepspeed.zero_optimization.stage=3", "train.max_steps=8", "train.checkpoint_every=4", "train.keep_last=9"),
        "distill.soft_weight={schedule: linear, start: 4, end: 0, span: 0.5}",
    ]
    kept, run, resumed = (tmp_path / name for name in ("kept", "run", "resumed"))
    tiny_run(kept, *settings, "teacher.release=never", ranks=2)
    tiny_run(run, *settings, "teacher.sharded=true", ranks=2)
    expected, found = values_of(kept, *LOSSES), values_of(run, *LOSSES)
    assert [found[key] for key in expected] == pytest.approx(list(expected.values()), abs=1e-6)
    back_to(4, run, resumed)
    assert "released at step 4, not loaded" in tiny_run(resumed, *settings, "teacher.sharded=true", ranks=2)
    assert_same_run(resumed, run)


def test_a_run_that_resumes_a_step_before_its_teacher_leaves_decides_as_it_would_have() -> None:
    """At step 19 it looks at the weight, at step 20 it acts: the look is not in the checkpoint, what it sees is."""
    distill = DistillConfig(soft_weight=Schedule("adaptive", 4.0, signal="gap"))
    config = RunConfig(teacher=TeacherConfig(path="a", release_after_steps=12), distill=distill)
    resolved = SimpleNamespace(config=config, total_steps=100)
    low = {"hard": 1.0, "soft": 1.0, "count": 19.0, "teacher_loss": 9.0}
    for step, idle, due in ((19, 12.0, True), (19, 11.0, False), (18, 30.0, False), (20, 30.0, False)):
        state = RunState(step=step, teacher_loss=9.0, adaptive={**low, "idle_steps": idle})
        weight = SoftWeight(resolved, state, None)  # type: ignore[arg-type]
        assert weight.release_is_due(step + 1) == due, (step, idle)


def test_a_step_without_a_label_moves_no_adaptive_weight() -> None:
    distill = DistillConfig(soft_weight=Schedule("adaptive", 4.0))
    resolved = SimpleNamespace(config=RunConfig(teacher=TeacherConfig(path="a"), distill=distill), total_steps=100)
    seen = {"hard": 3.0, "soft": 1.0, "count": 9.0, "teacher_loss": 2.5}
    weight = SoftWeight(resolved, RunState(step=9, teacher_loss=2.5, adaptive=seen), None)  # type: ignore[arg-type]
    meter = SimpleNamespace(losses=lambda: {"hard": torch.zeros(()), "soft": torch.zeros(())})
    weight.observe(meter, SimpleNamespace(aligned_share=None, temperature=1.0))  # type: ignore[arg-type]
    assert {name: weight.state_dict()[name] for name in seen} == seen


@pytest.mark.parametrize(("squared", "seen"), [(False, 8.0), (True, 2.0)])
def test_the_weight_sees_a_soft_loss_as_it_would_be_at_a_temperature_of_1(squared: bool, seen: float) -> None:
    distill = DistillConfig(soft_weight=Schedule("adaptive", 4.0), temperature_squared=squared)
    resolved = SimpleNamespace(config=RunConfig(teacher=TeacherConfig(path="a"), distill=distill), total_steps=100)
    weight = SoftWeight(resolved, RunState(step=0, teacher_loss=2.5), None)  # type: ignore[arg-type]
    meter = SimpleNamespace(losses=lambda: {"hard": torch.tensor(3.0), "soft": torch.tensor(2.0)})
    weight.observe(meter, SimpleNamespace(aligned_share=None, temperature=2.0))  # type: ignore[arg-type]
    assert weight.state_dict()["soft"] == seen


# Rounding could differ between ranks; here their counts do.
DECIDE = """
import sys
from types import SimpleNamespace
from dwt_ds.config.objective import DistillConfig, Schedule
from dwt_ds.config.schema import RunConfig, TeacherConfig
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.manifest import RunState
from dwt_ds.run.soft_weight import SoftWeight
ranks.start_ranks(120)
distill = DistillConfig(soft_weight=Schedule("adaptive", 4.0, signal="gap"))
config = RunConfig(teacher=TeacherConfig(path="a", release_after_steps=12), distill=distill)
low = {"hard": 1.0, "soft": 1.0, "count": 19.0, "teacher_loss": 9.0, "idle_steps": float(sys.argv[1])}
state = RunState(step=19, teacher_loss=9.0, adaptive=low)
weight = SoftWeight(SimpleNamespace(config=config, total_steps=100), state, None)
print("DUE" if weight.release_is_due(20) else "NOT YET")
ranks.stop_ranks()
"""


@pytest.mark.parametrize(("idle", "due"), [((11, 13), "DUE"), ((0, 23), "NOT YET")])
def test_ranks_that_count_differently_release_the_teacher_together(
    idle: tuple[int, int], due: str, run_ranks: Run
) -> None:
    said = run_ranks([["-c", DECIDE, str(steps)] for steps in idle])
    assert [ended.out.split("\n")[-2] for ended in said] == [due, due], said
