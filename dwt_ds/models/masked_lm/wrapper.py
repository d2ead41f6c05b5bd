"""A masked language model whose head runs only on the positions that the loss needs.

The loss does the decoder's product with the vocabulary: it takes hidden states and weights. So the encoder's output is
gathered at the wanted positions before the head (in known families already within the last layer), and no tensor of
(tokens x vocabulary) is made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dwt_ds.models.masked_lm.families import decoder_bias_of, decoder_of, encode_at, known_transform
from dwt_ds.models.masked_lm.masks import encoder_mask

_CHECKED_TOKENS = 8


class GatheredMaskedLM(nn.Module):
    """Wraps a Hugging Face `*ForMaskedLM`, kept as the submodule `model`.

    Raises:
        ValueError: the model has no linear output layer to split off.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        decoder_of(model)
        self.model = model
        self._transform = known_transform(model)

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
            raise ValueError(
                _cannot_split(self.model, f"its decoder ran {len(seen)} times in a forward pass, not once")
            )
        return seen[0].flatten(0, -2), encoded[-1]


@torch.no_grad()
def check_against_own_logits(gathered: GatheredMaskedLM, *, tolerance: float | None = None) -> None:
    """Compare `hidden @ decoder_weight.T + decoder_bias` with the model's own logits on two short random rows.

    It finds a head that scales its logits, or adds something that the loss would miss. The model's mode and device and
    the global random generator stay as they are.

    Args:
        gathered: the wrapped model, in any dtype, on any device.
        tolerance: largest difference allowed, as a share of the largest logit; None: 1e-5 in fp64 and fp32, 2e-2 in
            bf16 and fp16.

    Raises:
        ValueError: they differ, or the head cannot be split off.
    """
    model, weight = gathered.model, gathered.decoder_weight
    if tolerance is None:
        tolerance = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, weight.shape[0], (2, _CHECKED_TOKENS), generator=generator)
    pad = model.config.pad_token_id
    if pad is not None and weight.shape[0] > 1:
        input_ids[input_ids == pad] = 0 if pad else 1
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -2:] = 0
    positions = attention_mask.flatten().nonzero().flatten().flip(0)
    input_ids, attention_mask, positions = (each.to(weight.device) for each in (input_ids, attention_mask, positions))

    was_training = model.training
    model.eval()
    try:
        own = model(input_ids=input_ids, attention_mask=attention_mask).logits.flatten(0, 1)[positions]
        ours = nn.functional.linear(gathered(input_ids, attention_mask, positions), weight, gathered.decoder_bias)
    finally:
        model.train(was_training)
    if own.shape != ours.shape:
        raise ValueError(_cannot_split(model, f"its logits are {tuple(own.shape)}, the decoder's {tuple(ours.shape)}"))
    largest = own.abs().max().item()
    difference = (own - ours).abs().max().item()
    if not difference <= tolerance * max(largest, 1e-6):
        detail = f"hidden x decoder differs from its own logits by {difference:.3g} (largest logit {largest:.3g})"
        raise ValueError(_cannot_split(model, detail))


def freeze_unused_parameters(gathered: GatheredMaskedLM) -> list[str]:
    """Set `requires_grad` to False on parameters that the forward pass does not read; return their names.

    Some families have a pooler or tables for other uses, whose gradients would be reduced, clipped and decayed for
    nothing. Known families have none.

    Raises:
        ValueError: the model's own logits read such a parameter, so its head adds something that the loss would miss.
    """
    if gathered._transform is not None:
        return []
    model = gathered.model
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    input_ids = torch.ones((1, _CHECKED_TOKENS), dtype=torch.int64, device=gathered.decoder_weight.device)
    positions = torch.arange(2, device=input_ids.device)
    hidden = gathered(input_ids, None, positions)
    ours = nn.functional.linear(hidden, gathered.decoder_weight, gathered.decoder_bias).sum()
    unused = _without_gradient(ours, trainable)
    if unused:
        read = set(unused) - set(_without_gradient(model(input_ids=input_ids).logits.sum(), trainable))
        if read:
            raise ValueError(_cannot_split(model, f"its own logits also depend on {min(read)}"))
    for name in unused:
        trainable[name].requires_grad_(False)
    return unused


def _without_gradient(result: Tensor, parameters: dict[str, nn.Parameter]) -> list[str]:
    gradients = torch.autograd.grad(result, list(parameters.values()), allow_unused=True)
    return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]


def _cannot_split(model: PreTrainedModel, why: str) -> str:
    return f"the head of {type(model).__name__} cannot be split off: {why}; choose another family"
