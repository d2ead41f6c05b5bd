"""Quantization-aware training with torchao's fake quantizers, and the final rounding of the weights.

`add_fake_quantizers` swaps modules before the training engine is built. Parameters stay the same objects, so ties and
optimizers are not affected. Scales are computed from the values at every forward pass, so there is no state to save,
and a resumed run only calls `switch_fake_quantizers` for its step. `round_weights` uses the quantizers that trained the
weights: torchao's own conversion from these quantizers gives float layers back unrounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from dwt_ds.config.quantization import Quantization
from dwt_ds.models.token_types import OneTokenType

_INTEGER_TYPES = {bits: getattr(torch, f"int{bits}") for bits in range(2, 9)}


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded weight: `codes * scales`, one scale for each group of inputs."""

    codes: Tensor
    """(out, in) int8, for any number of bits."""
    scales: Tensor
    """(out, groups) fp32."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(out, in) weight in the given dtype."""
        rows, columns = self.codes.shape
        grouped = self.codes.to(torch.float32).view(rows, self.scales.shape[1], -1)
        return (grouped * self.scales[:, :, None]).view(rows, columns).to(dtype)


def add_fake_quantizers(model: PreTrainedModel, quantization: Quantization) -> list[str]:
    """Put fake quantizers, switched on, into the chosen layers of an encoder with any head; returns the layers' names.

    Raises ValueError if torchao is not installed, and as `quantized_layers` does.
    """
    qat = _torchao_qat()
    chosen = quantized_layers(model, quantization)
    weight = qat.IntxFakeQuantizeConfig(
        _INTEGER_TYPES[quantization.weight_bits],
        granularity="per_channel" if quantization.group_size is None else "per_group",
        group_size=quantization.group_size,
        is_symmetric=True,
    )
    activation = None
    if quantization.activation_bits is not None:
        bits = _INTEGER_TYPES[quantization.activation_bits]
        activation = qat.IntxFakeQuantizeConfig(bits, "per_token", is_symmetric=False)

    from torchao.quantization import quantize_

    tables = {name for name, module in model.named_modules() if name in chosen and _is_table(model, module)}
    for names, activation_config in ((tables, None), (set(chosen) - tables, activation)):
        config = qat.QATConfig(activation_config=activation_config, weight_config=weight, step="prepare")
        quantize_(model, config, filter_fn=lambda _module, name, names=names: name in names)
    for module in model.modules():
        quantizer = getattr(module, "activation_fake_quantizer", None)
        if quantizer is not None:
            quantizer.__class__ = _for_no_rows_as_well(quantizer.__class__)
    return chosen


@lru_cache
def _for_no_rows_as_well(kind: type[nn.Module]) -> type[nn.Module]:
    """torchao's quantizer, which fails on 0 rows: a rank's micro-batch may have no label, and so none for the head."""

    def forward(self: Any, values: Tensor) -> Tensor:
        return kind.forward(self, values) if values.numel() else values

    return type(kind.__name__, (kind,), {"forward": forward})


def check_quantization(config: PretrainedConfig, quantization: Quantization) -> None:
    """Refuse settings that do not fit a masked language model of this configuration; no weights are allocated.

    Errors are those of `add_fake_quantizers`.
    """
    _torchao_qat()
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    quantized_layers(model, quantization)


def quantized_layers(model: PreTrainedModel, quantization: Quantization) -> list[str]:
    """Names of the linear layers and tables that the settings choose, in the model's order.

    Raises ValueError if there is none, if `group_size` does not divide a layer's inputs, or if a table has its own
    look-up.
    """
    base = model.base_model
    inside = {f"{model.base_model_prefix}.{name}" for name, _ in base.named_modules()} if base is not model else set()
    holders = Counter(id(module.weight) for module in model.modules() if hasattr(module, "weight"))
    chosen = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            part = "embeddings"
        elif not isinstance(module, nn.Linear) or "pooler" in name:
            continue
        elif holders[id(module.weight)] > 1:
            part = "embeddings"
        else:
            part = "encoder" if name in inside else "head"
        if part not in quantization.modules:
            continue
        if isinstance(module, nn.Embedding) and type(module) not in (nn.Embedding, OneTokenType):
            # The fake quantizer's look-up would replace its own.
            raise ValueError(
                f"student.quantization.modules={list(quantization.modules)}: {name} is a {type(module).__name__}, "
                "which does more than look rows up; leave embeddings out"
            )
        inputs = module.weight.shape[1]
        if quantization.group_size is not None and inputs % quantization.group_size:
            raise ValueError(
                f"student.quantization.group_size={quantization.group_size} does not divide the {inputs} inputs of "
                f"{name}; choose one that divides the model's widths"
            )
        chosen.append(name)
    if not chosen:
        raise ValueError(
            f"student.quantization.modules={list(quantization.modules)} chooses no layer of this model; "
            "choose from encoder, embeddings, head"
        )
    return chosen


def switch_fake_quantizers(model: nn.Module, enabled: bool) -> None:
    """Switch all fake quantizers on or off; call it with `step >= start_step`, also after a resume."""
    for module in model.modules():
        for name in ("weight_fake_quantizer", "activation_fake_quantizer"):
            quantizer = getattr(module, name, None)
            if quantizer is not None:
                quantizer.enabled = enabled


@torch.no_grad()
def round_weights(model: PreTrainedModel) -> dict[str, QuantizedWeight]:
    """Round the weights of a prepared model in place; its activations are still rounded at each forward pass.

    A channel of a rounded layer, or each group of it, holds at most 2**weight_bits values. The model keeps Hugging
    Face's layout: `save_pretrained` writes a folder that plain transformers loads.

    Returns:
        Codes and scales by parameter name, for `dwt_ds.models.quantized_export`. They cannot be computed again from the
        rounded weights, because rounding is not idempotent.
    """
    switch_fake_quantizers(model, True)
    rounded: dict[str, QuantizedWeight] = {}
    done: set[int] = set()
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_fake_quantizer", None)
        if quantizer is None:
            continue
        weight = module.weight
        if id(weight) not in done:  # the weight of a tied decoder is met twice
            rounded[f"{name}.weight"] = _round(weight, quantizer)
            done.add(id(weight))
    drop_weight_quantizers(model)
    return rounded


def drop_weight_quantizers(model: nn.Module) -> None:
    """Stop rounding weights; activations are still rounded."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "weight_fake_quantizer"):
            module.weight_fake_quantizer = None


def _round(weight: Tensor, quantizer: Any) -> QuantizedWeight:
    from torchao.quantization.quant_primitives import quantize_affine

    values = quantizer(weight)
    group = weight.shape[1] // quantizer.scale.shape[1]
    bits = next(each for each, dtype in _INTEGER_TYPES.items() if dtype == quantizer.config.dtype)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = quantize_affine(weight, (1, group), quantizer.scale, quantizer.zero_point, torch.int8, lowest, highest)
    weight.copy_(values)
    return QuantizedWeight(codes, quantizer.scale.float())


def _is_table(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether only the weight is rounded: tables have no activations, and the loss does the decoder's product."""
    return isinstance(module, nn.Embedding) or module is model.get_output_embeddings()


def _torchao_qat() -> ModuleType:
    try:
        from torchao.quantization import qat
    except ImportError as error:
        raise ValueError(
            "student.quantization needs torchao, which is not installed; pip install torchao, or set it to none"
        ) from error
    return qat
