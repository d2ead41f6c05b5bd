"""A masked language model whose head runs only on the positions that the loss needs: all that a forward pass does.

The loss does the decoder's product with the vocabulary: it takes hidden states and weights. So the encoder's output is
gathered at the wanted positions before the head, and no tensor of (tokens x vocabulary) is made.

In known families it is gathered already within the last layer. Attention needs every token, but what follows it in the
last layer works on each token alone. So that part runs on the wanted positions only: the same numbers for a fraction of
the layer's matrix products. Attention stays dense, its queries included: a selection of queries, a different number in
each row, would save another twelfth of the layer, but the rows would have to be padded to a length that a GPU cannot
tell without a host synchronisation.

Modules are called as a whole, their weights are never used alone: ZeRO-3 gathers parameters around such calls, and
quantization-aware training rounds them there. The encoder, its last layer and that layer's attention block are not
called themselves, so hooks on them do not run. Gradient checkpointing covers all layers but the last, whose activations
are needed again as soon as the backward pass begins.

Attention masks have the cheapest form. Hugging Face's encoders check whether a mask is all ones, to skip it. For a mask
on a GPU the host waits for that check at every step. So a full mask on the CPU is dropped here, and a mask on a GPU is
expanded to the finished 4-D mask, which the encoders use unchecked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from dwt_ds.models.masked_lm.families import decoder_bias_of, decoder_of, family_of, known_layers, rows_at


class GatheredMaskedLM(nn.Module):
    """Wraps a Hugging Face `*ForMaskedLM`, kept as the submodule `model`; ValueError without a linear output layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        decoder_of(model)
        self.model = model
        self._transform = family_of(model).head
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # Some models warn of padding without a mask. To see it they read tokens, for which a host would wait.
                module.warn_if_padding_and_no_attention_mask = _no_warning  # type: ignore[method-assign]

    @property
    def decoder_weight(self) -> Tensor:
        """(V, H_dec), the live parameter, tied to the input embeddings if the model ties them.

        If quantization-aware training covers the decoder, it is the rounded weight, through which gradients pass.
        """
        decoder = decoder_of(self.model)
        quantizer = getattr(decoder, "weight_fake_quantizer", None)
        return decoder.weight if quantizer is None else quantizer(decoder.weight)

    @property
    def decoder_bias(self) -> Tensor | None:
        """(V,), the live parameter; None if the head has no bias."""
        return decoder_bias_of(self.model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor, everywhere: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What the decoder multiplies, at the given positions only.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), nonzero on real tokens; None (cheapest) if all are real.
            positions: (N,) int64, indices into the B * S flattened tokens; N may be 0.
            everywhere: return the encoder's output at all tokens, too.

        Returns:
            (N, H_dec) in the model's dtype; `hidden @ decoder_weight.T + decoder_bias` are the logits. With
            `everywhere` also (B * S, H).
        """
        if self._transform is None:
            hidden, encoded = self._traced(input_ids, attention_mask, positions)
            return (hidden, encoded) if everywhere else hidden
        mask = encoder_mask(self.model, attention_mask)
        if not everywhere:
            return self._transform(self.model, encode_at(self.model, input_ids, mask, positions))
        all_positions = torch.arange(input_ids.numel(), device=input_ids.device)
        encoded = encode_at(self.model, input_ids, mask, all_positions)
        return self._transform(self.model, encoded.index_select(0, positions)), encoded

    def _traced(self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Both for an unknown family: the model's own forward pass with two hooks.

        The first replaces the encoder's output by the gathered rows. The second keeps what reaches the decoder and
        gives the decoder no rows, so that its product costs nothing.
        """
        if attention_mask is not None and attention_mask.device.type == "cpu" and bool(attention_mask.all()):
            attention_mask = None
        encoded: list[Tensor] = []
        seen: list[Tensor] = []

        def gather(_module: nn.Module, _args: object, output: object) -> object:
            encoded.append(output[0].flatten(0, 1))  # type: ignore[index]
            rows = encoded[-1].index_select(0, positions).unsqueeze(0)
            if isinstance(output, tuple):
                return (rows, *output[1:])
            output["last_hidden_state"] = rows  # type: ignore[index]
            return output

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(args[0])
            return (args[0][:, :0], *args[1:])

        hooks = [
            self.model.base_model.register_forward_hook(gather),
            decoder_of(self.model).register_forward_pre_hook(keep),
        ]
        try:
            self.model(input_ids=input_ids, attention_mask=attention_mask)
        finally:
            for hook in hooks:
                hook.remove()
        if len(seen) != 1:
            raise ValueError(cannot_split(self.model, f"its decoder ran {len(seen)} times in a forward pass, not once"))
        return seen[0].flatten(0, -2), encoded[-1]


def _no_warning(*_tensors: object) -> None:
    pass


def encode_at(model: PreTrainedModel, input_ids: Tensor, attention_mask: Any, positions: Tensor) -> Tensor:
    """The encoder's output at some positions.

    All positions are computed, and the wanted ones selected, if the last layer is unknown: of another family or class
    (DeepSpeed may have replaced it), or in a decoder with causal attention.

    Args:
        input_ids: (B, S) int64.
        attention_mask: what `encoder_mask` returns.
        positions: (N,) int64, indices into the B * S flattened tokens, in any order; N may be 0.

    Returns:
        (N, H) in the model's dtype.
    """
    base: Any = model.base_model
    last, layers = family_of(model).last_layer, known_layers(model)
    if last is None or layers is None:
        return rows_at(base(input_ids=input_ids, attention_mask=attention_mask)[0], positions)
    hidden = base.embeddings(input_ids)
    mask = None
    if attention_mask is not None:  # of None transformers makes a mask while a CUDA graph is recorded, and only then
        mask = create_bidirectional_mask(config=base.config, inputs_embeds=hidden, attention_mask=attention_mask)
    for layer in layers[:-1]:
        hidden = layer(hidden, mask)
    return last.run(layers[-1], hidden, mask, positions)


def encoder_mask(model: PreTrainedModel, attention_mask: Tensor | None) -> Any:
    """The `attention_mask` argument for the encoder of a known family: None, the mask itself, or the finished mask.

    `attention_mask` is (B, S), nonzero on real tokens; None if every token is real.
    """
    if attention_mask is None:
        return None
    if attention_mask.device.type == "cpu":
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            return None
        return attention_mask
    return finished_mask(model, attention_mask)


def finished_mask(model: PreTrainedModel, attention_mask: Tensor) -> Any:
    """The mask in the form that the encoder's attention uses unchecked.

    Returns (B, 1, S, S), boolean for sdpa and additive for eager attention; for ModernBERT a mapping of those by type
    of layer; for other attention implementations the mask (B, S) itself.
    """
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return attention_mask
    batch, length = attention_mask.shape
    full = attention_mask.bool()[:, None, None, :].expand(batch, 1, length, length)
    if model.config.model_type != "modernbert":
        return _for_attention(full, model)
    place = torch.arange(length, device=attention_mask.device)
    near = (place[:, None] - place[None, :]).abs() <= model.config.sliding_window
    return {"full_attention": _for_attention(full, model), "sliding_attention": _for_attention(full & near, model)}


def _for_attention(allowed: Tensor, model: PreTrainedModel) -> Tensor:
    if model.config._attn_implementation == "sdpa":
        return allowed
    zero = torch.zeros((), dtype=model.dtype, device=allowed.device)
    return zero.where(allowed, torch.finfo(model.dtype).min)


def cannot_split(model: PreTrainedModel, why: str) -> str:
    return f"the head of {type(model).__name__} cannot be split off: {why}; choose another family"
