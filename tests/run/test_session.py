"""What comes after a step, and in which order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dwt_ds.config.schema import RunConfig, TrainConfig
from dwt_ds.run.session import Run


def bare_run(train: TrainConfig, total_steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, list[str]]:
    """A run without models, and what it does after a step."""
    done: list[str] = []
    for name in ("_note_skip", "_log", "_save", "_evaluate"):
        monkeypatch.setattr(Run, name, lambda self, step, name=name: done.append(f"{name} {step}"))
    run = Run.__new__(Run)
    run.config, run.total_steps, run.first_step = RunConfig(train=train), total_steps, 0
    run._parts = SimpleNamespace(adaptive=None, quantization=None)  # type: ignore[assignment]
    nothing = SimpleNamespace(beat=lambda step: None, advance=lambda: None, paused=lambda seconds: None)
    run._stuck = run._progress = run._meter = nothing  # type: ignore[assignment]
    run._ranks_asked_to_stop = torch.tensor(0)
    run.stopped = False
    return run, done


def test_a_checkpoint_is_saved_before_the_evaluation_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run, done = bare_run(TrainConfig(log_every=10, eval_every=2, checkpoint_every=2), 5, monkeypatch)
    for step in range(1, 5):
        run.end_step(step)
    assert done == [
        *("_note_skip 2", "_save 2", "_evaluate 2"),
        "_note_skip 3",
        *("_note_skip 4", "_save 4", "_evaluate 4"),
        *("_note_skip 5", "_log 5", "_save 5", "_evaluate 5"),
    ]


@pytest.mark.parametrize(("first", "every", "expected"), [(5, 0, [5]), (4, 2, [4]), (4, 0, []), (3, 2, []), (0, 1, [])])
@pytest.mark.parametrize("there", [False, True])
def test_a_resume_evaluates_what_the_last_start_did_not(
    first: int, every: int, expected: list[int], there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, done = bare_run(TrainConfig(eval_every=every), 5, monkeypatch)
    run.first_step = first
    run._folder = SimpleNamespace(has_held_out_loss=lambda step: there)  # type: ignore[assignment]
    run._catch_up()
    assert done == ([] if there else [f"_evaluate {step}" for step in expected])
