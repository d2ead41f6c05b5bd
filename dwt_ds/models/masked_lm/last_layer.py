"""The encoder, its last layer computed only where the head reads it.

Of the last layer's output a masked language model reads the labelled positions, about 15% of the tokens. Keys and
values are wanted everywhere; whatever follows the attention works on each token alone, so it runs on those positions
only: the same numbers, for a fraction of the layer's matrix products. Attention itself stays dense, queries included.
Picking the wanted ones, a different number in each row, would save a twelfth of the layer more, at the price of padding
to a length that a GPU cannot tell without a host synchronisation.

Every module is called, never its weights alone: ZeRO-3 gathers parameters, and quantization-aware training rounds
them, around such calls. Not called, so that hooks on them do not run, are the encoder, its last layer and that layer's
attention block as wholes. Gradient checkpointing covers the other layers: what the last one would keep is needed again
as soon as the backward pass begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

LastLayer = Callable[[Any, Tensor, Any, Tensor], Tensor]
"""(layer, hidden (B, S, H), finished mask or None, positions (N,)) -> the layer's output at the positions (N, H)."""


def encode_at(model: PreTrainedModel, input_ids: Tensor, attention_mask: Any, positions: Tensor) -> Tensor:
    """The encoder's output at some positions.

    Where the last layer's structure is not known here (another family, a decoder's causal attention, layers that
    DeepSpeed has replaced), all positions are computed and the wanted ones taken out.

    Args:
        model: a masked language model; its encoder is `model.base_model`.
        input_ids: (B, S) int64.
        attention_mask: as `dwt_ds.models.masked_lm.masks.encoder_mask` gives it.
        positions: (N,) int64, indices into the B * S flattened tokens, in any order; N may be 0.

    Returns:
        (N, H) in the model's dtype.
    """
    base: Any = model.base_model
    known = _known_layers(base)
    if known is None:
        return _rows(base(input_ids=input_ids, attention_mask=attention_mask)[0], positions)
    hidden = base.embeddings(input_ids)
    mask = create_bidirectional_mask(config=base.config, inputs_embeds=hidden, attention_mask=attention_mask)
    (*others, last), last_layer = known
    for layer in others:
        hidden = layer(hidden, mask)
    return last_layer(last, hidden, mask, positions)


def _bert(layer: Any, hidden: Tensor, mask: Any, positions: Tensor) -> Tensor:
    context = layer.attention.self(hidden, mask)[0]
    attended = layer.attention.output(_rows(context, positions), _rows(hidden, positions))
    return layer.output(layer.intermediate(attended), attended)


def _distilbert(layer: Any, hidden: Tensor, mask: Any, positions: Tensor) -> Tensor:
    context = layer.attention(hidden, mask)[0]  # the attention's module includes its output projection
    attended = layer.sa_layer_norm(_rows(context, positions) + _rows(hidden, positions))
    # Not `ffn` itself: its option to go in chunks counts on (B, S, H).
    return layer.output_layer_norm(layer.ffn.ff_chunk(attended) + attended)


_FAMILIES: dict[str, tuple[str, str, LastLayer]] = {
    "BertModel": ("encoder", "BertLayer", _bert),
    "RobertaModel": ("encoder", "RobertaLayer", _bert),
    "XLMRobertaModel": ("encoder", "XLMRobertaLayer", _bert),
    "CamembertModel": ("encoder", "CamembertLayer", _bert),
    "DistilBertModel": ("transformer", "TransformerBlock", _distilbert),
}
"""By encoder class: where its `layer` list is, the class of a layer, and how to run the last one."""


def _known_layers(base: Any) -> tuple[nn.ModuleList, LastLayer] | None:
    family = _FAMILIES.get(type(base).__name__)
    if family is None or getattr(base.config, "is_decoder", False):
        return None
    stack, layer_class, last_layer = family
    layers = getattr(base, stack).layer
    return (layers, last_layer) if type(layers[-1]).__name__ == layer_class else None


def _rows(tokens: Tensor, positions: Tensor) -> Tensor:
    return tokens.flatten(0, 1).index_select(0, positions)
