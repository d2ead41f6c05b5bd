"""What is known of each family: how its head and its last layer run at some positions only.

The others are known by what every masked language model has: a linear decoder and, in most, a list of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import gelu

HeadTransform = Callable[[Any, Tensor], Tensor]
"""(model, rows of the encoder's output (N, H)) -> what the decoder multiplies (N, H_dec)."""


class LastLayer(NamedTuple):
    """How to run the last layer of an encoder at some positions."""

    stack: str
    """The encoder's module whose `layer` is the list of layers."""
    layer_class: str
    run: Callable[[Any, Tensor, Any, Tensor], Tensor]
    """(layer, hidden (B, S, H), finished mask or None, positions (N,)) -> the layer's output there (N, H)."""


def _bert_head(model: Any, rows: Tensor) -> Tensor:
    return model.cls.predictions.transform(rows)


def _roberta_head(model: Any, rows: Tensor) -> Tensor:
    head = model.lm_head
    return head.layer_norm(gelu(head.dense(rows)))


def _distilbert_head(model: Any, rows: Tensor) -> Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(rows)))


def _modernbert_head(model: Any, rows: Tensor) -> Tensor:
    return model.head(rows)


def _bert_layer(layer: Any, hidden: Tensor, mask: Any, positions: Tensor) -> Tensor:
    context = layer.attention.self(hidden, mask)[0]
    attended = layer.attention.output(rows_at(context, positions), rows_at(hidden, positions))
    return layer.output(layer.intermediate(attended), attended)


def _distilbert_layer(layer: Any, hidden: Tensor, mask: Any, positions: Tensor) -> Tensor:
    context = layer.attention(hidden, mask)[0]  # the attention's module includes its output projection
    attended = layer.sa_layer_norm(rows_at(context, positions) + rows_at(hidden, positions))
    # Not `ffn` itself: it may split its input into chunks, for which it expects (B, S, H).
    return layer.output_layer_norm(layer.ffn.ff_chunk(attended) + attended)


class Family(NamedTuple):
    """What is known of the models of one class."""

    head: HeadTransform | None
    """None: not known; the model's own forward pass has to be traced."""
    last_layer: LastLayer | None
    """None: not known, or not known how to run it at some positions."""


_FAMILIES = {
    "BertForMaskedLM": Family(_bert_head, LastLayer("encoder", "BertLayer", _bert_layer)),
    "RobertaForMaskedLM": Family(_roberta_head, LastLayer("encoder", "RobertaLayer", _bert_layer)),
    "XLMRobertaForMaskedLM": Family(_roberta_head, LastLayer("encoder", "XLMRobertaLayer", _bert_layer)),
    "CamembertForMaskedLM": Family(_roberta_head, LastLayer("encoder", "CamembertLayer", _bert_layer)),
    "DistilBertForMaskedLM": Family(_distilbert_head, LastLayer("transformer", "TransformerBlock", _distilbert_layer)),
    "ModernBertForMaskedLM": Family(_modernbert_head, None),
}
"""By class of the model."""


def family_of(model: PreTrainedModel) -> Family:
    """What is known of a model."""
    return _FAMILIES.get(type(model).__name__, Family(None, None))


def known_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The encoder's layers if its last one can run at some positions only (`encode_at`); else None."""
    last = family_of(model).last_layer
    if last is None or getattr(model.base_model.config, "is_decoder", False):
        return None
    layers: nn.ModuleList = getattr(model.base_model, last.stack).layer
    return layers if type(layers[-1]).__name__ == last.layer_class else None


def encoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The encoder's layers in any family: the first list of as many as the configuration says, all of one class.

    Empty where there is none, as in ALBERT, whose layers are one and the same, or in XLM, whose layers are in pieces.
    """
    for parent in model.base_model.modules():
        lists = [child for child in parent.children() if isinstance(child, nn.ModuleList)]
        found = [each for each in lists if len(each) == model.config.num_hidden_layers]
        if len(found) == 1 and len({type(layer) for layer in found[0]}) == 1:
            return list(found[0])
    return []


def decoder_of(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that turns the head's output into logits; ValueError for a model without one."""
    decoder = model.get_output_embeddings()
    if not isinstance(getattr(decoder, "weight", None), Tensor) or decoder.weight.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} has no linear output layer over the vocabulary; choose another family"
        )
    return decoder


def decoder_bias_of(model: PreTrainedModel) -> Tensor | None:
    """(V,), what is added to the decoder's product: its own bias or, as in ESM, one that its parent module holds."""
    decoder = decoder_of(model)
    if decoder.bias is not None:
        return decoder.bias
    parent = next(each for each in model.modules() if any(child is decoder for child in each.children()))
    bias = getattr(parent, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def rows_at(tokens: Tensor, positions: Tensor) -> Tensor:
    """(N, H): of tokens (B, S, H) those at positions (N,)."""
    return tokens.flatten(0, 1).index_select(0, positions)
