"""What a session does around its steps, and in which order; no models, one rank."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.sessions import Steps, bare_session, numbers_of

from dwt_ds.config.schema import RunConfig, TrainConfig
from dwt_ds.data.batches import Batch, StepBatches
from dwt_ds.run.evaluation import Evaluation
from dwt_ds.run.guard import TooManySkipsError
from dwt_ds.run.session import Session


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a session does after a step."""
    done: list[str] = []
    for name in ("_note_skip", "_save", "_switch_quantization", "_evaluate", "_export_on_the_way"):
        monkeypatch.setattr(Session, name, lambda self, step, *_, name=name: done.append(f"{name} {step}"))
    return done


def test_a_checkpoint_is_saved_before_the_evaluation_of_its_step(done: list[str]) -> None:
    session = bare_session(RunConfig(train=TrainConfig(log_every=10, eval_every=2, checkpoint_every=2)), 5)
    session.log.step = lambda numbers, *_, **__: done.append(f"log {numbers.step + 1}")  # type: ignore[method-assign]
    for step in range(1, 4):
        session.end_step(numbers_of(step))
    assert done == [
        *("_note_skip 2", "_save 2", "_evaluate 2"),
        "_note_skip 3",
        *("_note_skip 4", "_save 4", "_evaluate 4"),
    ]
    done.clear()
    session.end_step(numbers_of(4))
    assert done == ["_note_skip 5", "log 5", "_save 5"]


def test_the_step_that_ends_a_run_by_its_skips_is_logged_before_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run resumes after it, and would never log it."""
    done: list[str] = []
    monkeypatch.setattr(Session, "_save", lambda self, step: done.append(f"save {step}"))
    folder = SimpleNamespace(path=None, add_skip=lambda row: done.append(f"skip {row}"))
    session = bare_session(RunConfig(train=TrainConfig(log_every=2, max_skipped_share=0)), 5, folder=folder)
    session.micro_batches.batches = SimpleNamespace(rows_consumed=lambda step: 4 * step, epoch=lambda step: 0.0)  # type: ignore[assignment]
    session.log.say = lambda *_: None  # type: ignore[method-assign]
    session.log.step = lambda numbers, *_, **__: done.append(f"log {numbers.step + 1}")  # type: ignore[method-assign]
    session.student.optimizer.overflow = True
    with pytest.raises(TooManySkipsError):
        session.end_step(numbers_of(1))
    rows = {"step": 2, "first_row": 4, "rows": 4, "epoch": 0}
    assert done == [f"skip {rows}", "log 2", "save 2"]


@pytest.mark.parametrize(
    ("first", "expected"),
    [(4, ["_switch_quantization 3", "_evaluate 4", "_export_on_the_way 4"]), (3, []), (0, [])],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_resume_makes_what_the_last_start_did_not(
    first: int, expected: list[str], there: bool, done: list[str], tmp_path: Path
) -> None:
    folder = SimpleNamespace(path=None, has_held_out_loss=lambda step: there, export_of=lambda step: tmp_path / "x")
    if there:
        (tmp_path / "x").mkdir()
    train = TrainConfig(eval_every=2, export_every=2)
    session = bare_session(RunConfig(train=train), 5, first_step=first, folder=folder)
    assert next(session.steps()) == first
    assert done == ([] if there else expected)
    assert (session._meter._paused_seconds > 0) == bool(done), "rates leave it out"


def test_the_request_of_another_rank_stops_the_session_a_step_later(done: list[str]) -> None:
    """The number of a step is read after the next one, so that the host does not wait for the device. No export keeps
    the session from saving."""
    session = bare_session(RunConfig(train=TrainConfig(export_every=1)), 5)
    steps = session.steps()
    assert next(steps) == 0
    session.end_step(replace(numbers_of(0), ranks_to_stop=torch.tensor(1)))
    assert next(steps) == 1
    session.end_step(numbers_of(1))
    assert list(steps) == []
    assert done == ["_note_skip 1", "_export_on_the_way 1", "_note_skip 2"]


def test_held_out_rows_without_a_label_are_reported_not_averaged() -> None:
    """Their mean would be NaN, in the output and in metrics.jsonl."""
    written: list[Any] = []
    said: list[str] = []
    losses = iter([{}, {"eval_hard_loss": 2.0, "eval_soft_loss": 0.0, "eval_hard_loss.books": 3.0}])
    evaluation = SimpleNamespace(student_losses=lambda *_: next(losses))
    log = SimpleNamespace(say=lambda done, text: said.append(text), add=written.append)
    session = bare_session(RunConfig(), 5, evaluation=evaluation, log=log)
    session._evaluate(2)
    session._evaluate(2)
    assert "no token to predict; prepare it with --validation above 0" in said[0]
    assert said[1] == "held-out: hard 2.0000; books 3.0000"
    assert written == [{"step": 2, "eval_hard_loss": 2.0, "eval_soft_loss": 0.0, "eval_hard_loss.books": 3.0}]


def test_an_evaluation_stops_between_two_sets_and_leaves_no_row() -> None:
    asked = iter([False, False, False, True])  # the first time at the start
    seen: list[int] = []
    sets = [[1] * 8, [2] * 12, [3] * 8]

    def student_losses(_: Any, __: Any, until_stopped: Any, done: int) -> dict[str, float]:
        for batches in sets:
            seen.extend(until_stopped(iter(batches)))
        return {"eval_hard_loss": 2.0}

    stop = SimpleNamespace(is_asked=lambda folder: next(asked))
    evaluation = SimpleNamespace(student_losses=student_losses, is_due=lambda done: False)
    session = bare_session(RunConfig(), 5, evaluation=evaluation, stop=stop)
    session._evaluate(2)
    assert list(session.steps()) == []
    assert seen == [1] * 8 + [2] * 8, "not a batch of the rest"
    session._done = 5
    assert len(list(session._until_stopped(iter([4] * 9)))) == 9, "the last one goes on"


def test_garbage_is_collected_at_the_same_steps_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    taken: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda generation: collected.append(len(taken)))
    for step in bare_session(RunConfig(), 250, first_step=30).steps():
        assert not gc.isenabled()
        taken.append(step)
    assert gc.isenabled()
    assert [taken[0] + count for count in collected] == [100, 200]


def test_nothing_of_the_vocabulary_of_a_teacher_outlives_its_release() -> None:
    """Its tables and tokenizers would stay on the host."""

    class Other:
        def __init__(self) -> None:
            self.tokens = type("Tokens", (), {})()

    class Table(list[int]):
        knows_words, full_width = True, 4

    other, config = Other(), RunConfig()
    sizes = {"micro_batch_size": 1, "accumulation": 1, "rank": 0, "world_size": 1}
    resolved: Any = SimpleNamespace(config=config, total_steps=4, corpus=SimpleNamespace(vocab_size=9))
    nothing: Any = None
    table: Any = Table(range(8))
    tokens: Any = other.tokens
    session = bare_session(
        config,
        4,
        batches=StepBatches(table, nothing, config.data, seed=0, teacher_tokens=tokens, **sizes),
        evaluation=Evaluation(resolved, nothing, {}, other),  # type: ignore[arg-type]
        teacher=SimpleNamespace(parameters=1, release=lambda: None),
    )
    kept = [weakref.ref(other), weakref.ref(tokens)]
    del other, tokens
    assert all(each() is not None for each in kept)
    session._release_teacher(2)
    gc.collect()
    assert [each() for each in kept] == [None, None]


def test_garbage_that_has_lived_long_is_collected_at_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    folder = SimpleNamespace(path=None, checkpoints=None, require_lock=lambda: None)
    session = bare_session(RunConfig(), 300, folder=folder, log=SimpleNamespace(say=lambda *_: None))
    monkeypatch.setattr("dwt_ds.run.session.save_checkpoint", lambda *_: 0.0)
    monkeypatch.setattr(session, "_state_at", lambda done: None)
    cycle: Cycle | None = Cycle()
    alive = weakref.ref(cycle)
    for step in session.steps():
        if step == 250:
            cycle = None
    assert alive() is not None
    session._save(300)
    assert alive() is None


def test_the_next_pass_of_the_teacher_begins_before_the_host_waits_for_the_norm() -> None:
    """And is not repeated; a teacher that is released in between leaves nothing behind."""
    passes: list[int] = []

    class Teacher:
        parameters = 1

        def __call__(self, batch: Batch) -> int:
            passes.append(int(batch.labels))
            return int(batch.labels)

        def release(self) -> None:
            assert session.micro_batches._first_taught is None, "its head stays in memory"

    def batch(label: int) -> Batch:
        one = torch.tensor([label])
        return Batch(one[None], None, torch.tensor([0]), one, 1, torch.zeros(1))

    steps = Steps([[batch(10 * step), batch(10 * step + 1)] for step in range(4)])
    session = bare_session(RunConfig(), 4, batches=steps, teacher=Teacher())
    for step in range(3):
        micro_batches = session.micro_batches.next_step()
        seen = [(int(each.labels), view) for each, view in session.micro_batches.with_teacher(micro_batches)]
        assert seen == [(10 * step, 10 * step), (10 * step + 1, 10 * step + 1)]
        session.student.optimizer.before_waiting_for_norm()
        assert passes == [0, 1, 10, 11, 20, 21, 30][: 2 * step + 3]
    session._release_teacher(3)
    micro_batches = session.micro_batches.next_step()
    assert [(int(each.labels), view) for each, view in session.micro_batches.with_teacher(micro_batches)] == [
        (30, None),
        (31, None),
    ]
    session.student.optimizer.before_waiting_for_norm()
    assert len(passes) == 7
