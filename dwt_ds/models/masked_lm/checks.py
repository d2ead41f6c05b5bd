"""Checks made once, before training: whether a head can be split off as `wrapper` does it, whether an export will round
what training rounds, and which parameters the forward pass does not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM, cannot_split
from dwt_ds.models.quantization import switch_fake_quantizers

_CHECKED_TOKENS = 8


@contextmanager
def _products_in_fp32() -> Iterator[None]:
    """NVIDIA's containers let a GPU round the operands of fp32 products to TF32, which moves logits by 2e-4."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@_products_in_fp32()
def check_against_own_logits(gathered: GatheredMaskedLM, *, tolerance: float | None = None) -> None:
    """Compare `hidden @ decoder_weight.T + decoder_bias` with the model's own logits on two short random rows.

    It finds a head that scales its logits, or adds something that the loss would miss. The model's mode and device and
    the global random generator stay as they are.

    The `tolerance` is a share of the largest logit; None: 1e-5 in fp64 and fp32, 2e-2 in bf16 and fp16.

    Raises ValueError if they differ by more, or the head cannot be split off.
    """
    model, weight = gathered.model, gathered.decoder_weight
    if tolerance is None:
        tolerance = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    input_ids, attention_mask, positions = _two_short_rows(gathered)
    was_training = model.training
    model.eval()
    try:
        own = model(input_ids=input_ids, attention_mask=attention_mask).logits.flatten(0, 1)[positions]
        ours = nn.functional.linear(gathered(input_ids, attention_mask, positions), weight, gathered.decoder_bias)
    finally:
        model.train(was_training)
    if own.shape != ours.shape:
        raise ValueError(cannot_split(model, f"its logits are {tuple(own.shape)}, the decoder's {tuple(ours.shape)}"))
    largest = own.abs().max().item()
    difference = (own - ours).abs().max().item()
    if not difference <= tolerance * max(largest, 1e-6):
        detail = f"hidden x decoder differs from its own logits by {difference:.3g} (largest logit {largest:.3g})"
        raise ValueError(cannot_split(model, detail))


@torch.no_grad()
@_products_in_fp32()
def check_rounded_weights(gathered: GatheredMaskedLM, modules: Sequence[str]) -> None:
    """Refuse to round a weight that the model also reads where no quantizer is.

    An export's weight is rounded wherever it is read, so its model would not be the one that was trained. The fake
    quantizers are switched on at the end.

    Raises ValueError, in one line with the first layer of such a weight and `student.quantization.modules`.
    """
    layers: dict[int, dict[str, Any]] = {}
    for name, module in gathered.model.named_modules():
        if getattr(module, "weight_fake_quantizer", None) is not None:
            layers.setdefault(id(module.weight), {})[name] = module
    # All at once first: one by one takes two forward passes a layer.
    suspects = [] if _same_when_rounded(gathered, list(layers.values())) else list(layers.values())
    for owners in suspects:
        if not _same_when_rounded(gathered, [owners]):
            name = next(iter(owners))
            raise ValueError(
                f"student.quantization.modules={list(modules)}: the model also reads the weight of {name} without "
                "rounding it, so the export would not be the model that was trained; leave out the part with that layer"
            )
    switch_fake_quantizers(gathered.model, True)


def _same_when_rounded(gathered: GatheredMaskedLM, layers: list[dict[str, Any]]) -> bool:
    """Whether logits of training with these layers' weights rounded are those of a model that holds them rounded.

    layers: for each weight, the modules that hold it by name.
    """
    model = gathered.model
    input_ids, attention_mask, positions = _two_short_rows(gathered)
    switch_fake_quantizers(model, False)
    rounded = {}
    for owners in layers:
        for module in owners.values():
            module.weight_fake_quantizer.enabled = True
        name, module = next(iter(owners.items()))
        rounded[f"{name}.weight"] = module.weight_fake_quantizer(module.weight)
    was_training = model.training
    model.eval()
    try:
        hidden = gathered(input_ids, attention_mask, positions)
        trained = nn.functional.linear(hidden, gathered.decoder_weight, gathered.decoder_bias)
        switch_fake_quantizers(model, False)
        rows = {"input_ids": input_ids, "attention_mask": attention_mask}
        exported = torch.func.functional_call(model, rounded, kwargs=rows).logits.flatten(0, 1)[positions]
    finally:
        model.train(was_training)
    return torch.allclose(trained, exported, rtol=0, atol=1e-5 * exported.abs().max().item())


def _two_short_rows(gathered: GatheredMaskedLM) -> tuple[Tensor, Tensor, Tensor]:
    """Random input_ids (2, S) and their attention_mask (2, S), the second row padded; positions of the real tokens."""
    entries, device = gathered.decoder_weight.shape[0], gathered.decoder_weight.device
    input_ids = torch.randint(0, entries, (2, _CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))
    pad = gathered.model.config.pad_token_id
    if pad is not None and entries > 1:
        input_ids[input_ids == pad] = 0 if pad else 1
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -2:] = 0
    positions = attention_mask.flatten().nonzero().flatten().flip(0)
    return input_ids.to(device), attention_mask.to(device), positions.to(device)


def freeze_unused_parameters(gathered: GatheredMaskedLM) -> list[str]:
    """Set `requires_grad` to False on parameters that the forward pass does not read; return their names.

    Some families have a pooler or tables for other uses, whose gradients would be reduced, clipped and decayed for
    nothing. Known families have none.

    Raises ValueError if the model's own logits read such a parameter: its head adds something that the loss would miss.
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
            raise ValueError(cannot_split(model, f"its own logits also depend on {min(read)}"))
    for name in unused:
        trainable[name].requires_grad_(False)
    return unused


def _without_gradient(result: Tensor, parameters: dict[str, nn.Parameter]) -> list[str]:
    gradients = torch.autograd.grad(result, list(parameters.values()), allow_unused=True)
    return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
