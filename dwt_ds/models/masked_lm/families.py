"""What is known of each family of masked language models: its head before the decoder, and its last encoder layer.

The loss of a masked language model needs the encoder's output at the labelled positions only. Attention needs every
token, but what follows it in the last layer works on each token alone. So that part runs on the wanted positions only:
the same numbers for a fraction of the layer's matrix products. Attention stays dense, its queries included: a selection
of queries, a different number in each row, would save another twelfth of the layer, but the rows would have to be
padded to a length that a GPU cannot tell without a host synchronisation.

Modules are called as a whole, their weights are never used alone: ZeRO-3 gathers parameters around such calls, and
quantization-aware training rounds them there. The encoder, its last layer and that layer's attention block are not
called themselves, so hooks on them do not run. Gradient checkpointing covers all layers but the last, whose activations
are needed again as soon as the backward pass begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import gelu
from transformers.masking_utils import create_bidirectional_mask

HeadTransform = Callable[[Any, Tensor], Tensor]
"""(model, rows of the encoder's output (N, H)) -> what the decoder multiplies (N, H_dec)."""


class _LastLayer(NamedTuple):
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
    attended = layer.attention.output(_rows(context, positions), _rows(hidden, positions))
    return layer.output(layer.intermediate(attended), attended)


def _distilbert_layer(layer: Any, hidden: Tensor, mask: Any, positions: Tensor) -> Tensor:
    context = layer.attention(hidden, mask)[0]  # the attention's module includes its output projection
    attended = layer.sa_layer_norm(_rows(context, positions) + _rows(hidden, positions))
    # Not `ffn` itself: it may split its input into chunks, for which it expects (B, S, H).
    return layer.output_layer_norm(layer.ffn.ff_chunk(attended) + attended)


_FAMILIES: dict[str, tuple[HeadTransform, _LastLayer | None]] = {
    "BertForMaskedLM": (_bert_head, _LastLayer("encoder", "BertLayer", _bert_layer)),
    "RobertaForMaskedLM": (_roberta_head, _LastLayer("encoder", "RobertaLayer", _bert_layer)),
    "XLMRobertaForMaskedLM": (_roberta_head, _LastLayer("encoder", "XLMRobertaLayer", _bert_layer)),
    "CamembertForMaskedLM": (_roberta_head, _LastLayer("encoder", "CamembertLayer", _bert_layer)),
    "DistilBertForMaskedLM": (_distilbert_head, _LastLayer("transformer", "TransformerBlock", _distilbert_layer)),
    "ModernBertForMaskedLM": (_modernbert_head, None),
}
"""By class of the model: the head's transform and, if it is known, the last layer."""


def known_transform(model: PreTrainedModel) -> HeadTransform | None:
    """The head's transform; None for an unknown family, whose own forward pass has to be traced."""
    transform, _ = _FAMILIES.get(type(model).__name__, (None, None))
    return transform


def known_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The encoder's layers if its last one can run at some positions only (`encode_at`); else None."""
    _, last = _FAMILIES.get(type(model).__name__, (None, None))
    if last is None or getattr(model.base_model.config, "is_decoder", False):
        return None
    layers: nn.ModuleList = getattr(model.base_model, last.stack).layer
    return layers if type(layers[-1]).__name__ == last.layer_class else None


def encoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The encoder's layers in any family: the first list of as many as the configuration says, all of one class.

    Empty where there is none, as in ALBERT, whose layers are one and the same.
    """
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    for layers in lists:
        if len(layers) == model.config.num_hidden_layers and len({type(layer) for layer in layers}) == 1:
            return list(layers)
    return []


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


def decoder_bias_of(model: PreTrainedModel) -> Tensor | None:
    """(V,), what is added to the decoder's product: its own bias or, as in ESM, one that its parent module holds."""
    decoder = decoder_of(model)
    if decoder.bias is not None:
        return decoder.bias
    parent = next(each for each in model.modules() if any(child is decoder for child in each.children()))
    bias = getattr(parent, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def encode_at(model: PreTrainedModel, input_ids: Tensor, attention_mask: Any, positions: Tensor) -> Tensor:
    """The encoder's output at some positions.

    All positions are computed, and the wanted ones selected, if the last layer is unknown: of another family or class
    (DeepSpeed may have replaced it), or in a decoder with causal attention.

    Args:
        model: a masked language model; its encoder is `model.base_model`.
        input_ids: (B, S) int64.
        attention_mask: what `dwt_ds.models.masked_lm.masks.encoder_mask` returns.
        positions: (N,) int64, indices into the B * S flattened tokens, in any order; N may be 0.

    Returns:
        (N, H) in the model's dtype.
    """
    base: Any = model.base_model
    _, last = _FAMILIES.get(type(model).__name__, (None, None))
    layers = known_layers(model)
    if last is None or layers is None:
        return _rows(base(input_ids=input_ids, attention_mask=attention_mask)[0], positions)
    hidden = base.embeddings(input_ids)
    mask = None
    if attention_mask is not None:  # of None transformers makes a mask while a CUDA graph is recorded, and only then
        mask = create_bidirectional_mask(config=base.config, inputs_embeds=hidden, attention_mask=attention_mask)
    for layer in layers[:-1]:
        hidden = layer(hidden, mask)
    return last.run(layers[-1], hidden, mask, positions)


def _rows(tokens: Tensor, positions: Tensor) -> Tensor:
    return tokens.flatten(0, 1).index_select(0, positions)
