"""Operations of a row: those of matrix products, attention's among them. A multiplication and an addition are two."""

from __future__ import annotations

import copy
from dataclasses import astuple, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from dwt_ds.data.overlap import Overlap
from dwt_ds.models.build import longest_row
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.models.meta_device import RepeatedOperations


def meta_model(config: PretrainedConfig, model_class: type[PreTrainedModel] | None = None) -> GatheredMaskedLM:
    """A frozen model of this configuration, on the meta device; transformers chooses its class unless one is given."""
    build = AutoModelForMaskedLM.from_config if model_class is None else model_class._from_config
    with torch.device("meta"):
        model = build(copy.deepcopy(config), attn_implementation="eager")
    return GatheredMaskedLM(model.eval().requires_grad_(False))


def forward_flops(
    gathered: GatheredMaskedLM, seq_len: int, labels_per_row: int, vocab_size: int, *, everywhere: bool = False
) -> int:
    """Operations of one row's forward pass, logits included; with `everywhere` the last layer runs at all tokens."""
    model = copy.deepcopy(gathered).eval()
    model.model.set_attn_implementation("eager")
    with torch.no_grad(), torch.device("meta"), RepeatedOperations(), FlopCounterMode(display=False) as counter:
        model(
            torch.zeros(1, seq_len, dtype=torch.int64),
            None,
            torch.zeros(labels_per_row, dtype=torch.int64),
            everywhere=everywhere,
        )
    return counter.get_total_flops() + 2 * labels_per_row * vocab_size * int(model.decoder_weight.shape[-1])


def recomputed_flops(gathered: GatheredMaskedLM, seq_len: int, labels_per_row: int) -> int:
    """Operations of one row's forward pass that activation checkpointing repeats in the backward pass."""
    counts = []
    for checkpointing in (False, True):
        model = copy.deepcopy(gathered).train()
        model.model.set_attn_implementation("eager")
        if checkpointing:
            model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.device("meta"), RepeatedOperations(), FlopCounterMode(display=False) as counter:
            positions = torch.zeros(labels_per_row, dtype=torch.int64)
            model(torch.zeros(1, seq_len, dtype=torch.int64), None, positions).sum().backward()
        counts.append(counter.get_total_flops())
    without, with_checkpointing = counts
    return int(with_checkpointing - without)


@dataclass(frozen=True)
class Work:
    """Operations per row of the data, or per token."""

    student_forward: float
    teacher_forward: float
    """What the teacher costs: with a vocabulary of its own also the student's logits of the shared entries, with a
    hidden loss its projection, forward and backward."""
    recomputed: float = 0
    """Of the student's forward pass, repeated in the backward pass (activation checkpointing): they take time."""
    student_for_soft: float = 0
    """Of the student's forward pass, at positions that the soft loss alone sees."""

    @property
    def per_row(self) -> float:
        """Without repetitions: the student's forward pass and twice that backward, the teacher's forward pass."""
        return 3 * self.student_forward + self.teacher_forward

    def without_teacher(self) -> Work:
        """That of a student that trains alone from here on."""
        return Work(self.student_forward - self.student_for_soft, 0, self.recomputed)

    def per_token(self, tokens_per_row: float) -> Work:
        """Operations per token, of operations per row."""
        return Work(*(each / tokens_per_row for each in astuple(self)))


def work_of_a_row(
    student: GatheredMaskedLM,
    teacher: GatheredMaskedLM | None,
    *,
    seq_len: int,
    labels: int,
    further: int = 0,
    vocab_size: int,
    overlap: Overlap | None = None,
    hidden_loss: bool = False,
) -> Work:
    """Operations, without repetitions, of a row with `labels` labelled tokens and `further` for the soft loss alone.

    The models are on the meta device; `vocab_size` is the student's. There is an `overlap` if the teacher has a
    vocabulary of its own.
    """
    ours = forward_flops(student, seq_len, labels, vocab_size)
    if teacher is None:
        return Work(ours, 0)
    sizes = [each.model.config.hidden_size for each in (student, teacher)]
    projection = 3 * 2 * seq_len * sizes[0] * sizes[1] if hidden_loss else 0
    if overlap is None:
        with_further = forward_flops(student, seq_len, labels + further, vocab_size) if further else ours
        theirs = forward_flops(teacher, seq_len, labels + further, vocab_size, everywhere=hidden_loss)
        return Work(with_further, theirs + projection, student_for_soft=with_further - ours)
    aligned, width = round(overlap.aligned_share * labels), teacher_width(teacher, overlap, seq_len)
    again = 2 * aligned * overlap.entries * int(student.decoder_weight.shape[-1])
    theirs = forward_flops(teacher, width, aligned, overlap.entries, everywhere=hidden_loss)
    return Work(ours, theirs + 3 * again + projection)


def teacher_width(teacher: GatheredMaskedLM, overlap: Overlap, seq_len: int) -> int:
    """The teacher's tokens for a row of `seq_len` of the student's; rows longer than it can read are cut."""
    wanted, longest = round(overlap.teacher_tokens * seq_len), longest_row(teacher.model.config)
    return wanted if longest is None else min(wanted, longest)
