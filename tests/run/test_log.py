"""What a run prints: the time that is left, and nothing of the libraries."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.tiny import TinyRun

from dwt_ds.config.objective import DistillConfig, Schedule
from dwt_ds.config.schema import RunConfig, TeacherConfig
from dwt_ds.distill.objective import LossScalars
from dwt_ds.models.flops import Work
from dwt_ds.run import log
from dwt_ds.run.log import RunLog
from dwt_ds.run.mfu import Utilization
from dwt_ds.run.step_numbers import StepNumbers

ROW = {"loss": 1.0, "hard_loss": 1.0, "soft_loss": 0.5, "tokens_per_second": 1.0}
# A quarter of a step's operations are the teacher's, and a quarter those of the student's further positions.
WORK = Work(student_forward=3, teacher_forward=3, student_for_soft=1)
TO_0 = Schedule(schedule="linear", start=4, end=0, span=0.4)


@pytest.mark.parametrize(
    ("schedule", "release", "work", "steps"),
    [
        # After 10 of 100 steps: 30 with the teacher, 60 of half the work.
        (TO_0, "auto", WORK, 30 + 60 / 2),
        (TO_0, "never", WORK, 90),
        (TO_0, "auto", None, 90),
        (Schedule(schedule="linear", start=4, end=0, span_steps=500), "auto", WORK, 90),
        (Schedule(schedule="adaptive", start=4), "auto", WORK, 90),
    ],
)
def test_the_time_left_has_the_teacher_only_until_its_release(
    schedule: Schedule, release: Any, work: Work | None, steps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(teacher=TeacherConfig(path="any", release=release), distill=DistillConfig(soft_weight=schedule))
    for name, value in {
        "gradient_norm": 1.0,
        "loss_scale": None,
        "peak_memory_bytes": 0,
        "write_monitors": None,
    }.items():
        monkeypatch.setattr(log, name, lambda *_, value=value: value)
    folder: Any = SimpleNamespace(add_metrics=lambda row: None)
    resolved: Any = SimpleNamespace(config=config, total_steps=100)
    student: Any = SimpleNamespace(skipped_steps=0)
    its = RunLog(resolved, student, folder, 0, None if work is None else Utilization(work, 1e12))
    left: list[float] = []
    monkeypatch.setattr(its.progress, "line", lambda row, *, peak_memory_bytes, seconds_left: left.append(seconds_left))

    def step(done: int, seconds: float, *, teacher: bool) -> None:
        meter: Any = SimpleNamespace(seconds_since_start=seconds, row=lambda **_: ROW)
        scalars = LossScalars(*torch.ones(5))
        its.step(StepNumbers(done - 1, scalars, 1.0, 1.0, 0.1, torch.tensor(0)), meter, teacher_active=teacher)

    step(10, 20.0, teacher=True)
    assert left == [pytest.approx(2.0 * steps)]
    if (schedule, release, work) == (TO_0, "auto", WORK):
        step(40, 80.0, teacher=True)
        its.teacher_released(40, 1000, SimpleNamespace(seconds_since_start=80.0))  # type: ignore[arg-type]
        step(50, 91.0, teacher=False)
        assert left[1:] == [pytest.approx(2.0 * 60 / 2), pytest.approx(1.1 * 50)]


def test_a_monitor_without_room_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(log, "write_monitors", fail)
    rows: list[Any] = []
    folder: Any = SimpleNamespace(add_metrics=rows.append)
    resolved: Any = SimpleNamespace(config=RunConfig(), total_steps=100)
    student: Any = SimpleNamespace(skipped_steps=0)
    RunLog(resolved, student, folder, 0, None).add({"step": 1})
    assert rows == [{"step": 1}]
    assert "lack this row: No space left on device" in capsys.readouterr().out


def test_no_warning_of_a_library_is_printed(tiny_run: TinyRun, tmp_path: Path) -> None:
    """transformers 5.23 warns of the name by which activation checkpointing is switched on."""
    assert "Warning" not in tiny_run(tmp_path, "train.activation_checkpointing=true", "train.max_steps=1")
