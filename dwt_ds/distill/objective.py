"""The loss of distillation from a weak teacher, computed inside the student's one forward pass.

Source: Lee et al., "Study on Distillation from a Weak Teacher", Findings of ACL 2023, section 2: the student's loss is
the masked-token cross-entropy plus the weighted KL divergence between the teacher's and the student's predictions at
the masked positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from dwt_kernels import DistillLoss, linear_distill_loss
from dwt_kernels.arguments import resolve_backend
from torch import Tensor, nn

from dwt_ds.config.objective import DistillConfig
from dwt_ds.data.batches import Batch
from dwt_ds.data.shared_vocabulary import SharedVocabulary
from dwt_ds.distill.hidden import HiddenLoss
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM

_NO_LABEL = -100


class SharedEntries(NamedTuple):
    """The E entries that the vocabularies of student and teacher have in common, on the models' device."""

    student_ids: Tensor
    """(E,) int64: rows of the student's head."""
    index_of_student: Tensor
    """(V,) int64: which of the E a token of the student is; -1 for none."""

    @classmethod
    def of(cls, shared: SharedVocabulary, device: torch.device) -> SharedEntries:
        return cls(
            torch.from_numpy(shared.student_ids).to(device),
            torch.from_numpy(shared.shared_index_of_student).to(device),
        )


class TeacherView(NamedTuple):
    """The teacher's prediction at N positions, as hidden states and head: the loss multiplies them to logits.

    A teacher with another vocabulary predicts at the M aligned positions, and its head is that of the E shared entries.
    """

    hidden: Tensor
    """(N, H_teacher), or (M, H_teacher)."""
    weight: Tensor
    """(V or more, H_teacher), or (E, H_teacher)."""
    bias: Tensor | None
    """(V or more,), or (E,)."""
    shared: SharedEntries | None = None
    """None for a teacher with the student's vocabulary."""
    everywhere: Tensor | None = None
    """(B x S_t, H_teacher): its hidden states at all tokens of its rows; None without a hidden loss."""


def head_rows(weight: Tensor, bias: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows `ids` (E,) of a head: (E, H) of its weight (V, H), (E,) of its bias (V,)."""
    return weight.index_select(0, ids), None if bias is None else bias.index_select(0, ids)


class LossScalars(NamedTuple):
    """What may change from step to step, as 0-d fp32 tensors, so that a new value recompiles nothing."""

    soft_weight: Tensor
    temperature: Tensor
    hard_rows: Tensor
    """Divides the summed cross-entropy: labelled tokens over all ranks and accumulation steps."""
    soft_rows: Tensor
    """Divides the summed KL divergence: positions over all ranks and accumulation steps."""
    hidden_rows: Tensor
    """Divides the summed hidden loss: tokens, or words, over all ranks and accumulation steps."""


class Losses(NamedTuple):
    """Of one micro-batch, fp32 scalars; the gradient goes through `loss` alone."""

    loss: Tensor
    hard: Tensor
    soft: Tensor
    """Of all soft rows."""
    shared_hard: Tensor | None = None
    """Cross-entropy on the shared entries at the aligned positions, which compares with such a teacher's own; None for
    a teacher with the student's vocabulary, whose loss compares with `hard`."""
    labelled_soft: Tensor | None = None
    """KL divergence at the labelled tokens alone, which compares with `hard`; None where `soft` is just that."""
    hidden: Tensor | None = None
    """Distance of the hidden states; None without a hidden loss."""


def check_loss_kernel(config: DistillConfig, device: torch.device) -> None:
    """Whether the kernel that the settings choose for the loss runs on this device (ValueError)."""
    try:
        backend = resolve_backend(config.backend, device)
    except ValueError:
        raise ValueError(
            f"distill.backend={config.backend!r}: it needs a GPU and the package triton; set it to auto or torch"
        ) from None
    if config.memory == "logit_free" and backend != "triton":
        raise ValueError(
            f"distill.memory={config.memory!r}: only Triton's kernel has it, and the loss runs on {backend} here; set "
            "it to auto or chunked"
        )


class DistillObjective(nn.Module):
    """The student with its loss: the module that DeepSpeed trains.

    Args:
        vocab_size: tokens in the vocabulary; further columns of either head get no probability.
        hidden_loss: on a layer of the student; None: none.
    """

    def __init__(
        self,
        student: GatheredMaskedLM,
        config: DistillConfig,
        vocab_size: int,
        hidden_loss: HiddenLoss | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.hidden_loss = hidden_loss
        self._config, self._vocab_size = config, vocab_size

    def forward(self, batch: Batch, teacher: TeacherView | None, scalars: LossScalars) -> Losses:
        """Loss of one micro-batch, summed over its rows and divided by `scalars`'s counts.

        With shared entries, the hard loss is still over the whole vocabulary. The soft loss is over these entries
        alone, both distributions renormalized to them. The hidden loss is for training only.
        """
        if self.hidden_loss is None or not self.training:
            return self._of_logits(batch, teacher, scalars)
        if teacher is None or teacher.everywhere is None:  # the teacher was released
            losses = self._of_logits(batch, teacher, scalars)
            return losses._replace(loss=losses.loss + self.hidden_loss.ended())
        self.hidden_loss.listen()
        losses = self._of_logits(batch, teacher, scalars)
        words = None if batch.teacher is None else batch.teacher.words
        distance = self.hidden_loss(teacher.everywhere, batch.attention_mask, words) / scalars.hidden_rows
        return losses._replace(
            loss=losses.loss + self._config.hidden_weight * scalars.soft_weight * distance, hidden=distance.detach()
        )

    def _of_logits(self, batch: Batch, teacher: TeacherView | None, scalars: LossScalars) -> Losses:
        """Hard and soft loss."""
        hidden = self.student(batch.input_ids, batch.attention_mask, batch.positions)
        weight, bias = self.student.decoder_weight, self.student.decoder_bias
        if teacher is not None and self._config.soft_positions != "labelled":
            # In two calls, so that the soft loss of the labelled tokens is known: one more sum of the head's gradient.
            sizes = [len(batch.labels), len(hidden) - len(batch.labels)]
            (ours, further), (theirs, of_further) = hidden.split(sizes), teacher.hidden.split(sizes)
            loss = self._loss(ours, weight, bias, teacher._replace(hidden=theirs), batch.labels, scalars)
            rest = self._loss(further, weight, bias, teacher._replace(hidden=of_further), None, scalars)
            labelled_soft = loss.soft * (scalars.soft_rows / scalars.hard_rows)
            return Losses(loss.loss + rest.loss, loss.hard, loss.soft + rest.soft, labelled_soft=labelled_soft)
        if teacher is None or teacher.shared is None:
            return Losses(*self._loss(hidden, weight, bias, teacher, batch.labels, scalars))
        assert batch.teacher is not None  # it made the view
        aligned, ids = batch.teacher.aligned, teacher.shared.student_ids
        whole = self._loss(hidden, weight, bias, None, batch.labels, scalars)
        ours, head = hidden.index_select(0, aligned), head_rows(weight, bias, ids)
        labels = teacher.shared.index_of_student[batch.labels[aligned]]
        counts = scalars._replace(hard_rows=scalars.soft_rows)
        shared = self._loss(ours, *head, teacher, labels, counts, hard_weight=0.0, vocab_size=len(ids))
        return Losses(whole.loss + shared.loss, whole.hard, shared.soft, shared.hard)

    def _loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: TeacherView | None,
        labels: Tensor | None,
        scalars: LossScalars,
        *,
        hard_weight: float | None = None,
        vocab_size: int | None = None,
    ) -> DistillLoss:
        """At N positions with `labels` (N,); None: with the soft loss alone. Weight and vocabulary are the run's if not
        given."""
        return linear_distill_loss(
            hidden,
            weight,
            bias,
            None if teacher is None else teacher.hidden,
            None if teacher is None else teacher.weight,
            None if teacher is None else teacher.bias,
            hidden.new_full(hidden.shape[:1], _NO_LABEL, dtype=torch.int64) if labels is None else labels,
            temperature=scalars.temperature,
            hard_weight=self._config.hard_weight if hard_weight is None else hard_weight,
            soft_weight=scalars.soft_weight,
            ignore_index=_NO_LABEL,
            soft_positions="labelled" if labels is not None else "all",
            temperature_squared=self._config.temperature_squared,
            vocab_size=vocab_size or self._vocab_size,
            normalizer=(scalars.hard_rows, scalars.soft_rows),
            backend=self._config.backend,
            memory=self._config.memory,
        )
