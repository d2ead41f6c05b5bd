"""Held-out losses, as exact means over all validation labels of all ranks.

`reduce_sum` sums a tensor over the ranks. The micro-batches are this rank's, and already on `device`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from dwt_kernels import linear_distill_loss
from torch import Tensor

from dwt_ds.config.objective import DistillConfig
from dwt_ds.data.batches import Batch
from dwt_ds.data.shared_vocabulary import SharedVocabulary
from dwt_ds.distill.objective import Losses, LossScalars, SharedEntries, TeacherView, head_rows


class HeldOut(NamedTuple):
    """Means over the labelled tokens of the validation rows, or over the aligned ones where noted."""

    hard_loss: float
    soft_loss: float
    """With shared entries, over the aligned tokens."""
    shared_hard_loss: float | None = None
    """Cross-entropy on the shared entries, over the aligned tokens; None for a teacher with the same vocabulary."""


class TeacherHeldOut(NamedTuple):
    """How good a teacher is on the validation rows."""

    hard_loss: float
    """Masked-token cross-entropy, nats; with another vocabulary that on the shared entries, at the aligned tokens."""
    shared_mass: float | None = None
    """Probability that it gives to the shared entries together, mean over the aligned tokens; None for the same
    vocabulary."""


@torch.no_grad()
def held_out_loss(
    objective: Callable[[Batch, TeacherView | None, LossScalars], Losses],
    teacher: Callable[[Batch], TeacherView] | None,
    batches: Iterable[Batch],
    temperature: float,
    reduce_sum: Callable[[Tensor], Tensor],
    device: torch.device,
) -> HeldOut | None:
    """Cross-entropy and KL divergence of the student on held-out micro-batches; None where these have no label.

    The `objective` is in evaluation mode. Without a teacher the soft loss is 0.
    """
    one = torch.ones((), device=device)
    tau = torch.tensor(temperature, device=device)
    scalars = LossScalars(one, tau, hard_rows=one, soft_rows=one, hidden_rows=one)
    sums, counts, is_shared = torch.zeros(3, dtype=torch.float64, device=device), [0, 0], False
    for batch in batches:
        loss = objective(batch, teacher(batch) if teacher else None, scalars)
        is_shared = loss.shared_hard is not None
        shared_hard = torch.zeros_like(loss.hard) if loss.shared_hard is None else loss.shared_hard
        sums += torch.stack([loss.hard, loss.soft, shared_hard])
        counts = [counts[0] + len(batch.labels), counts[1] + batch.soft_rows]
    hard, soft, shared_hard, labels, soft_rows = reduce_sum(torch.cat([sums, sums.new_tensor(counts)])).tolist()
    if not labels:
        return None
    soft_rows = max(soft_rows, 1.0)  # rows may have labels of which none is aligned
    return HeldOut(hard / labels, soft / soft_rows, shared_hard / soft_rows if is_shared else None)


@torch.no_grad()
def teacher_held_out_loss(
    teacher: Callable[[Batch], TeacherView],
    batches: Iterable[Batch],
    vocab_size: int,
    config: DistillConfig,
    reduce_sum: Callable[[Tensor], Tensor],
    device: torch.device,
    shared: SharedVocabulary | None = None,
) -> TeacherHeldOut | None:
    """How good the teacher is; None without a labelled token (with another vocabulary: without an aligned one).

    Args:
        teacher: gives its hidden states (with another vocabulary: at the aligned positions) and its whole head.
        batches: with the teacher's rows, if it has a vocabulary of its own.
        vocab_size: tokens in the teacher's vocabulary; further columns of its head get no probability.
        config: the loss kernel is the student's.
        shared: which entries of a vocabulary of its own are the student's too.
    """
    sums, count = torch.zeros(2, dtype=torch.float64, device=device), 0
    common = None
    if shared is not None:
        common = SharedEntries.of(shared, device).index_of_student, torch.from_numpy(shared.teacher_ids).to(device)
    for batch in batches:
        view = teacher(batch)
        whole, labels = (view.weight, view.bias), batch.labels
        if common is None:
            loss = _cross_entropy(view.hidden, *whole, labels, vocab_size, config, reduction="sum")
            mass = torch.zeros_like(loss)
        else:
            assert batch.teacher is not None
            index_of_student, ids = common
            labels, some = index_of_student[labels[batch.teacher.aligned]], head_rows(*whole, ids)
            among_some = _cross_entropy(view.hidden, *some, labels, len(ids), config, reduction="none")
            among_all = _cross_entropy(view.hidden, *whole, ids[labels], vocab_size, config, reduction="none")
            # Both are -log p(label), and differ by the log of what the shared entries have of the probability.
            loss, mass = among_some.sum(), (among_some - among_all).exp().sum()
        sums += torch.stack([loss, mass])
        count += len(labels)
    loss_of_all, mass_of_all, rows = reduce_sum(torch.cat([sums, sums.new_tensor([count])])).tolist()
    return TeacherHeldOut(loss_of_all / rows, None if shared is None else mass_of_all / rows) if rows else None


def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    vocab_size: int,
    config: DistillConfig,
    *,
    reduction: Literal["sum", "none"],
) -> Tensor:
    """fp64: (N,), or 0-d for their sum, of labels (N,)."""
    return linear_distill_loss(
        *(hidden, weight, bias),
        *(None, None, None),
        labels,
        vocab_size=vocab_size,
        reduction=reduction,
        backend=config.backend,
        memory=config.memory,
    ).hard.double()
