"""The loss of distillation from a weak teacher, computed inside the student's one forward pass.

Source: Lee et al., "Study on Distillation from a Weak Teacher", Findings of ACL 2023, section 2: the student's loss is
the masked-token cross-entropy plus the weighted KL divergence between the teacher's and the student's predictions at
the masked positions.
"""

from __future__ import annotations

from typing import NamedTuple

from dwt_kernels import DistillLoss, linear_distill_loss
from torch import Tensor, nn

from dwt_ds.config.schema import DistillConfig
from dwt_ds.data.batches import Batch
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM


class TeacherView(NamedTuple):
    """The teacher's prediction at N positions, as hidden states and head: the loss multiplies them to logits."""

    hidden: Tensor
    """(N, H_teacher)."""
    weight: Tensor
    """(V or more, H_teacher)."""
    bias: Tensor | None
    """(V or more,)."""


class LossScale(NamedTuple):
    """What may change from step to step, as 0-d fp32 tensors, so that a new value recompiles nothing."""

    soft_weight: Tensor
    temperature: Tensor
    hard_rows: Tensor
    """Divides the summed cross-entropy: labelled tokens over all ranks and accumulation steps."""
    soft_rows: Tensor
    """Divides the summed KL divergence: positions over all ranks and accumulation steps."""


class DistillObjective(nn.Module):
    """The student with its loss: the module that DeepSpeed trains.

    Args:
        student: the model, its head split off.
        config: weights, positions and kernel of the objective.
        vocab_size: tokens in the vocabulary; further columns of either head get no probability.
    """

    def __init__(self, student: GatheredMaskedLM, config: DistillConfig, vocab_size: int) -> None:
        super().__init__()
        self.student = student
        self.hard_weight = config.hard_weight
        self.soft_positions = config.soft_positions
        self.temperature_squared = config.temperature_squared
        self.backend = config.backend
        self.memory = config.memory
        self.vocab_size = vocab_size

    def forward(self, batch: Batch, teacher: TeacherView | None, scale: LossScale) -> DistillLoss:
        """Loss of one micro-batch, summed over its rows and divided by `scale`'s counts; fp32 scalars."""
        hidden = self.student(batch.input_ids, batch.attention_mask, batch.positions)
        return linear_distill_loss(
            hidden,
            self.student.decoder_weight,
            self.student.decoder_bias,
            None if teacher is None else teacher.hidden,
            None if teacher is None else teacher.weight,
            None if teacher is None else teacher.bias,
            batch.labels,
            temperature=scale.temperature,
            hard_weight=self.hard_weight,
            soft_weight=scale.soft_weight,
            soft_positions=self.soft_positions,
            temperature_squared=self.temperature_squared,
            vocab_size=self.vocab_size,
            normalizer=(scale.hard_rows, scale.soft_rows),
            backend=self.backend,
            memory=self.memory,
        )
