"""What lies between the encoder and the decoder of a masked language model, family by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import gelu

HeadTransform = Callable[[Any, Tensor], Tensor]
"""(model, rows of the encoder's output (N, H)) -> what the decoder multiplies (N, H_dec)."""


def _bert(model: Any, rows: Tensor) -> Tensor:
    return model.cls.predictions.transform(rows)


def _roberta(model: Any, rows: Tensor) -> Tensor:
    head = model.lm_head
    return head.layer_norm(gelu(head.dense(rows)))


def _distilbert(model: Any, rows: Tensor) -> Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(rows)))


def _modernbert(model: Any, rows: Tensor) -> Tensor:
    return model.head(rows)


_TRANSFORMS: dict[str, HeadTransform] = {
    "BertForMaskedLM": _bert,
    "RobertaForMaskedLM": _roberta,
    "XLMRobertaForMaskedLM": _roberta,
    "CamembertForMaskedLM": _roberta,
    "DistilBertForMaskedLM": _distilbert,
    "ModernBertForMaskedLM": _modernbert,
}


def known_transform(model: PreTrainedModel) -> HeadTransform | None:
    """The head's transform where the family is known here, else None: then the model's own forward has to be traced."""
    return _TRANSFORMS.get(type(model).__name__)


def decoder_of(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that turns the head's output into logits.

    Raises:
        ValueError: the model has no such layer; only a linear decoder can be split off.
    """
    decoder = model.get_output_embeddings()
    if not isinstance(getattr(decoder, "weight", None), Tensor) or decoder.weight.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} has no linear output layer over the vocabulary; choose another family"
        )
    return decoder
