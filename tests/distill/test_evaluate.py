"""Held-out losses against the plain formula, and how ranks add theirs up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dwt_ds.config.objective import DistillConfig
from dwt_ds.data.batches import Batch
from dwt_ds.distill import evaluate
from dwt_ds.distill.evaluate import held_out_loss, teacher_held_out_loss
from dwt_ds.distill.objective import Losses, TeacherView

VOCABULARY, WIDTH, CPU = 11, 4, torch.device("cpu")
RANDOM = torch.Generator().manual_seed(0)
WEIGHT, BIAS = torch.randn(VOCABULARY + 2, WIDTH, generator=RANDOM), torch.randn(VOCABULARY + 2, generator=RANDOM)
HIDDEN = torch.randn(40, WIDTH, generator=RANDOM)
LABELS = torch.randint(0, VOCABULARY, (40,), generator=RANDOM)


def batch(first: int, count: int) -> Batch:
    """Positions `first`... of HIDDEN."""
    labels = LABELS[first : first + count]
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(none, None, torch.arange(first, first + count), labels, count, none)


def teacher(batch: Batch) -> TeacherView:
    """Its head has two columns more than the vocabulary."""
    return TeacherView(HIDDEN[batch.positions], WEIGHT, BIAS)


def loss_of(batches: list[Batch], config: DistillConfig | None = None, others: tuple[float, float] = (0, 0)) -> Any:
    def reduce_sum(sums: Tensor) -> Tensor:
        loss, labels = others
        return sums + torch.tensor([loss, 0.0, labels], dtype=sums.dtype)

    found = teacher_held_out_loss(teacher, batches, VOCABULARY, config or DistillConfig(), reduce_sum, CPU)
    return None if found is None else found.hard_loss


def test_the_teachers_loss_is_the_mean_over_all_labels_not_over_batches() -> None:
    batches = [batch(0, 25), batch(25, 2), batch(28, 0)]
    labelled = torch.cat([each.positions for each in batches])
    logits = (HIDDEN.double() @ WEIGHT.double().T + BIAS.double())[labelled, :VOCABULARY]
    assert len(labelled) == 27
    assert loss_of(batches) == pytest.approx(cross_entropy(logits, LABELS[labelled]).item(), rel=1e-6)


def test_ranks_add_up_their_losses_and_their_labels() -> None:
    alone = loss_of([batch(0, 10)])
    assert loss_of([batch(0, 10)], others=(50.0, 20.0)) == pytest.approx((alone * 10 + 50.0) / 30)


def test_the_students_losses_are_means_over_the_rows_of_all_ranks() -> None:
    """Exact ones: 2^24 + 1 is no number in fp32."""
    batches = [batch(0, 20), batch(20, 10)._replace(positions=torch.arange(15))]
    losses = iter([Losses(*map(torch.tensor, (0.0, 2.0**24, 3.0))), Losses(*map(torch.tensor, (0.0, 1.0, 0.25)))])
    others = torch.tensor([7.0, 6.0, 0.0, 10.0, 2.0], dtype=torch.float64)
    found = held_out_loss(lambda *_: next(losses), None, batches, 1.0, lambda sums: sums + others, CPU)
    assert found == ((2**24 + 1 + 7) / (20 + 10 + 10), (3 + 0.25 + 6) / (20 + 15 + 2), None)


def test_without_a_labelled_token_there_is_no_loss() -> None:
    assert loss_of([]) is None
    assert loss_of([batch(0, 0)]) is None
    nothing = torch.zeros(3)
    batches = [batch(0, 0)]
    objective = lambda *_: Losses(nothing[0], nothing[0], nothing[0])  # noqa: E731
    assert held_out_loss(objective, None, batches, 1.0, lambda sums: sums, CPU) is None


def test_the_teacher_is_evaluated_by_the_kernel_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    plain = evaluate.linear_distill_loss

    def recording(*tensors: Any, **keywords: Any) -> Any:
        seen.append((keywords["backend"], keywords["memory"]))
        return plain(*tensors, **keywords)

    monkeypatch.setattr(evaluate, "linear_distill_loss", recording)
    loss_of([batch(0, 10)], DistillConfig(backend="torch", memory="chunked"))
    assert seen == [("torch", "chunked")]
