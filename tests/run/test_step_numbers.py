"""The numbers of a step that all ranks share, and the soft weight that follows them; no models, one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.sessions import Steps, bare_session, batch, numbers_of

from dwt_ds.config.objective import DistillConfig, Schedule
from dwt_ds.config.schema import RunConfig, TeacherConfig
from dwt_ds.data.teacher_rows import CommonWords, TeacherRows
from dwt_ds.distill.objective import Losses, LossScalars
from dwt_ds.engine import ranks
from dwt_ds.run.session import Session, StepNumbers


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
