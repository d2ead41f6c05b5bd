"""A step's numbers, and what comes after a step in which order; no models, one rank."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dwt_ds.config.objective import DistillConfig, Schedule
from dwt_ds.config.schema import RunConfig, TeacherConfig, TrainConfig
from dwt_ds.data.batches import Batch, StepBatches
from dwt_ds.data.teacher_rows import CommonWords, TeacherRows
from dwt_ds.distill.objective import Losses, LossScalars
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.manifest import RunState
from dwt_ds.run.evaluation import Evaluation
from dwt_ds.run.guard import TooManySkipsError
from dwt_ds.run.session import Session, StepNumbers


class Steps(list[list[Batch]]):
    """Batches of each step."""

    def without_teacher(self) -> Steps:
        return Steps([[each._replace(positions=each.positions[: len(each.labels)]) for each in step] for step in self])


def bare_session(config: RunConfig, total_steps: int, *, first_step: int = 0, **parts: Any) -> Session:
    """Its collaborators do nothing, but for those given."""
    student = SimpleNamespace(
        _config=SimpleNamespace(gradient_allreduce_op="mean"),
        gradient_accumulation_steps=lambda: 2,
        get_lr=lambda: [0.125],
        lr_scheduler=None,
        optimizer=SimpleNamespace(),
        module=SimpleNamespace(forward=None),
    )
    nothing = SimpleNamespace(beat=lambda step: None, advance=lambda: None, is_asked=lambda folder: False)
    every = config.train.eval_every
    evaluation = SimpleNamespace(
        is_due=lambda done: done > 0 and every > 0 and done % every == 0, release_teacher=lambda: None
    )
    given = {
        "batches": Steps([[]] * total_steps),
        "evaluation": evaluation,
        "folder": SimpleNamespace(path=None),
        "teacher": None,
        "log": SimpleNamespace(progress=nothing, step=lambda *_, **__: None, teacher_released=lambda *_: None),
        "stop": nothing,
        **parts,
    }
    return Session(
        resolved=SimpleNamespace(config=config, total_steps=total_steps, quantization=None),  # type: ignore[arg-type]
        student=student,
        exporter=nothing,  # type: ignore[arg-type]
        facts=nothing,  # type: ignore[arg-type]
        state=RunState(step=first_step),
        stuck=nothing,  # type: ignore[arg-type]
        **given,
    )


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a session does after a step."""
    done: list[str] = []
    for name in ("_note_skip", "_save", "_switch_quantization", "_evaluate", "_export_on_the_way"):
        monkeypatch.setattr(Session, name, lambda self, step, *_, name=name: done.append(f"{name} {step}"))
    return done


def numbers_of(step: int) -> StepNumbers:
    one = torch.ones(())
    return StepNumbers(step, LossScalars(one, one, one, one, one), 1.0, 1.0, 1e-3, torch.tensor(0))


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


def batch(labels: list[int], tokens: int, further: int = 0) -> Batch:
    ids, positions = torch.zeros(1, tokens, dtype=torch.int64), torch.arange(len(labels) + further)
    return Batch(ids, None, positions, torch.tensor(labels), tokens, torch.arange(1))


def test_a_step_begins_with_one_sum_over_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its means are over all ranks' labels and positions; the other rank here was asked to stop."""
    config = RunConfig(
        distill=DistillConfig(soft_weight=Schedule("linear", 4.0, 2.0), temperature=Schedule("constant", 1.5))
    )
    micro_batches = [batch([5, 7], 6, further=1), batch([8], 4, further=1)]
    teacher = SimpleNamespace(parameters=1, release=lambda: None)
    session = bare_session(config, 4, batches=Steps([micro_batches] * 4), teacher=teacher)
    sums: list[list[int]] = []

    def reduce_sum(values: torch.Tensor) -> torch.Tensor:
        sums.append(values.tolist())
        return values + torch.tensor([7, 15, 20, 20, 1])

    monkeypatch.setattr(ranks, "reduce_sum", reduce_sum)
    found = session.micro_batches.next_step()
    numbers = session.begin_step(2, found)
    assert [each.positions.tolist() for each in found] == [[0, 1, 2], [0, 1]]
    assert sums == [[3, 5, 10, 10, 0]]
    # DeepSpeed divides by two accumulation steps once more.
    assert LossScalars(*(float(each) for each in numbers.scalars)) == (3.0, 1.5, 10 / 2, 20 / 2, 30 / 2)  # type: ignore[arg-type]
    assert (numbers.step, numbers.soft_weight, numbers.temperature) == (2, 3.0, 1.5)
    assert numbers.learning_rate == 0.125
    assert numbers.ranks_to_stop == 1
    assert session._meter.tokens == 30
    session._release_teacher(3)  # the student goes on with the labelled tokens
    found = session.micro_batches.next_step()
    session.begin_step(3, found)
    assert [each.positions.tolist() for each in found] == [[0, 1], [0]]
    assert sums[1] == [3, 3, 10, 10, 0]


def test_a_steps_numbers_go_to_a_gpu_in_one_copy_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    session = bare_session(RunConfig(), 4)
    session.device = torch.device("cuda")
    real, copies = torch.tensor, []

    def tensor(values: list[float], *, dtype: torch.dtype, pin_memory: bool) -> Any:
        def to(device: torch.device, *, non_blocking: bool) -> torch.Tensor:
            copies.append((device.type, pin_memory, non_blocking))
            return real(values, dtype=dtype)

        return SimpleNamespace(to=to)

    monkeypatch.setattr(torch, "tensor", tensor)
    session.begin_step(0, [])
    assert copies == [("cuda", True, True)]


def test_a_student_alone_has_the_labelled_positions_only() -> None:
    session = bare_session(RunConfig(), 1, batches=Steps([[batch([5], 6, further=2)]]))
    assert [each.positions.tolist() for each in session.micro_batches.next_step()] == [[0]]


def test_soft_rows_of_a_teacher_with_another_vocabulary_are_the_aligned_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The global share of the labels is read from the same sums."""
    config = RunConfig(teacher=TeacherConfig(path="any", vocabulary="shared"))
    ids = torch.zeros(1, 2, dtype=torch.int64)
    words = CommonWords(ids, ids, 2)
    rows = TeacherRows(ids, None, torch.tensor([0, 1]), torch.tensor([1, 2]), words)
    micro_batches = [
        batch([5, 6, 7], 6)._replace(teacher=rows),
        batch([8], 4)._replace(teacher=rows._replace(aligned=ids[0, :0])),
    ]
    session = bare_session(config, 4, batches=Steps([micro_batches] * 4), teacher=SimpleNamespace())
    monkeypatch.setattr(ranks, "reduce_sum", lambda values: values + torch.tensor([6, 3, 1, 0, 0]))
    numbers = session.begin_step(0, session.micro_batches.next_step())
    assert (float(numbers.scalars.hard_rows), float(numbers.scalars.soft_rows)) == (10 / 2, 5 / 2)
    assert float(numbers.scalars.hidden_rows) == (2 + 2 + 1) / 2, "words"
    assert numbers.aligned_share == 0.5
    monkeypatch.setattr(ranks, "reduce_sum", torch.zeros_like)
    nothing = session.begin_step(1, session.micro_batches.next_step())
    assert nothing.aligned_share == 0, "no rank has a label"
    assert [float(rows) for rows in nothing.scalars[2:]] == [1 / 2] * 3
    one = torch.tensor(1.0)
    for shared_hard in (one, 3 * one):
        session._meter.add(Losses(one, 2 * one, one, shared_hard))
    monkeypatch.setattr(ranks, "reduce_sum", lambda values: values)
    losses = {name: float(value) for name, value in session._meter.losses().items()}
    assert losses == {"loss": 1, "hard": 2, "soft": 1, "shared_hard": 2}


def watched(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Session, list[tuple[torch.Tensor, ...]]]:
    """A session whose adaptive weight notes the hard and the soft loss that it is shown."""
    observed: list[tuple[torch.Tensor, ...]] = []
    session = bare_session(RunConfig(**settings), 4, teacher=SimpleNamespace())
    adaptive = SimpleNamespace(observe=lambda hard, soft, _: observed.append((hard, soft)))
    session._soft_weight._adaptive = adaptive  # type: ignore[assignment]
    monkeypatch.setattr(ranks, "reduce_sum", lambda values: values)
    monkeypatch.setattr(session, "_note_skip", lambda done: None)
    return session, observed


@pytest.mark.parametrize(("aligned", "seen"), [(0.0, []), (0.25, [3.0])])
def test_a_step_without_aligned_tokens_is_not_a_loss_of_0(
    aligned: float, seen: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adaptive weight would take it for a student that knows all."""
    session, observed = watched(monkeypatch, teacher=TeacherConfig(path="any", vocabulary="shared"))
    one = torch.tensor(1.0)
    session._meter.add(Losses(one, one, one, 3 * one if seen else 0 * one))
    scalars = LossScalars(one, one, hard_rows=one, soft_rows=one, hidden_rows=one)
    session.end_step(StepNumbers(1, scalars, 1.0, 1.0, 0.1, 0 * one, aligned_share=torch.tensor(aligned)))
    assert [float(hard) for hard, _ in observed if hard.isfinite()] == pytest.approx(
        [x / session._divisor for x in seen]
    )


@pytest.mark.parametrize(("whole", "seen"), [(2.0, [0.5]), (float("inf"), []), (float("nan"), [])])
def test_the_weight_compares_soft_and_hard_loss_on_the_same_tokens(
    whole: float, seen: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The soft loss of all its rows is logged; one that overflowed is left out."""
    further = {"teacher": TeacherConfig(path="any"), "distill": DistillConfig(soft_positions=0.3)}
    session, observed = watched(monkeypatch, **further)
    one = torch.tensor(1.0)
    for labelled_soft in (0.25, 0.75):
        session._meter.add(Losses(one, one, torch.tensor(whole), labelled_soft=torch.tensor(labelled_soft)))
    session.end_step(numbers_of(1))
    assert session._divisor == 2
    assert [float(soft) for _, soft in observed if soft.isfinite()] == seen
    assert session._meter.row()["labelled_soft_loss"] == 0.5
    assert "labelled_soft_loss" not in session._meter.row(with_teacher=False)


@pytest.mark.parametrize("skipped", [False, True])
def test_the_weight_does_not_follow_a_step_that_was_skipped(skipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a spike is finite, and would move the averages for many steps."""
    session, observed = watched(monkeypatch, teacher=TeacherConfig(path="any"))
    session.student.optimizer.overflow = skipped
    session.end_step(numbers_of(1))
    assert len(observed) == (0 if skipped else 1)


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
