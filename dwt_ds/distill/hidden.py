"""A loss between hidden states: an early layer of the student follows the teacher's last one, at every token.

Source: "Late-to-Early Training", arXiv 2602.05393, which has it for decoders. It compares the teacher's last hidden
state with that of an early layer of the student, through a small projection, and its weight falls to 0. Here the weight
is in proportion to the soft loss's, so that both end together when the student has caught up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from dwt_ds.config.schema import RunConfig
from dwt_ds.data.teacher_rows import CommonWords
from dwt_ds.models.masked_lm.families import encoder_layers

# This family calls its layers' `forward` itself, so that hooks on them do not run.
_WITHOUT_HOOKS = "squeezebert"


class HiddenLoss(nn.Module):
    """1 - cosine between the teacher's last hidden state of a token and a projection of the student's.

    A teacher with another vocabulary has other tokens: there the means over the tokens of each word are compared. The
    projection (H_teacher, H_student) is trained with the student and is no part of what is exported.

    Args:
        layer: of the student's encoder; its output (B, S, H_student), or the first of a tuple, is what follows.
        student_size, teacher_size: H_student and H_teacher.
    """

    def __init__(self, layer: nn.Module, student_size: int, teacher_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(student_size, teacher_size, bias=False)
        self._listens = False
        self._heard: Tensor | None = None
        layer.register_forward_hook(self._hear)

    def listen(self) -> None:
        """Keep the layer's output in the next forward pass of the student."""
        self._listens = True

    def _hear(self, _layer: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        # Once: the passes of an evaluation between two steps keep nothing.
        if self._listens:
            self._heard, self._listens = output if isinstance(output, Tensor) else output[0], False

    def forward(self, theirs: Tensor, attention_mask: Tensor | None, words: CommonWords | None = None) -> Tensor:
        """The sum over all real tokens, or words, of the rows in the student's last forward pass, 0-d fp32.

        Args:
            theirs: (B x S_t, H_teacher), the teacher's hidden states of these rows.
            attention_mask: (B, S), nonzero on the student's real tokens; None: all are.
            words: those that both have, for a teacher with another vocabulary; None: its tokens are the student's.
        """
        assert self._heard is not None  # the student's forward pass comes before
        tokens = theirs.shape[0] if words is None else words.ours.numel()
        # Longformer's layers have further columns, which fill the last attention window.
        ours, self._heard = self._heard[:, : tokens // len(self._heard)].flatten(0, 1), None
        if words is None:
            distance = 1 - cosine_similarity(self.projection(ours).float(), theirs.float(), dim=-1)
            return distance.sum() if attention_mask is None else (distance * (attention_mask.flatten() != 0)).sum()
        # In the hidden states' dtype for the projection; the cosine is in fp32.
        means = _means(ours, words.ours, words.total).to(ours.dtype)
        targets = _means(theirs, words.theirs, words.total)
        return (1 - cosine_similarity(self.projection(means).float(), targets, dim=-1)).sum()

    def ended(self) -> Tensor:
        """A 0-d fp32 zero whose gradient is 0. Under ZeRO-3, a weight without a gradient would keep its last one."""
        nothing = self.projection.weight.new_zeros(1, self.projection.in_features)
        return self.projection(nothing).float().sum()


def _means(hidden: Tensor, word: Tensor, total: int) -> Tensor:
    """(total, H) fp32: mean over the tokens of each word from 1 on, of hidden (T, H) and word (B, T / B)."""
    word = word.flatten()
    sums = hidden.new_zeros(total + 1, hidden.shape[1], dtype=torch.float32).index_add(0, word, hidden.float())
    tokens = sums.new_zeros(total + 1).index_add(0, word, sums.new_ones(len(word)))
    return sums[1:] / tokens[1:, None]


def hidden_loss_of(student: PreTrainedModel, teacher_size: int, config: RunConfig) -> HiddenLoss:
    """The hidden loss of a recipe: on `distill.hidden_layer`, or a third of the way up.

    Raises:
        ValueError: the student has no encoder layer whose hidden states can be read.
    """
    layers = encoder_layers(student)
    if not layers or student.config.model_type == _WITHOUT_HOOKS:
        raise ValueError(
            f"distill.hidden_weight: student.family={config.student.family!r} has no encoder layer whose hidden states "
            "can be read, and the hidden loss needs one; set it to 0, or choose another family"
        )
    layer = config.distill.hidden_layer or max(1, round(len(layers) / 3))
    return HiddenLoss(layers[layer - 1], student.config.hidden_size, teacher_size)
