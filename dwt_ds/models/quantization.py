"""Quantization-aware training with torchao's fake quantizers, and the true rounding at its end.

`prepare` swaps modules before the training engine is built; parameters stay the same objects, so ties and optimizers
do not notice. Scales are computed from the values at every forward pass: there is no state to save, and a resumed run
only has to call `enable` again for its step. `convert` rounds the weights with the very quantizers that trained them,
because torchao's own conversion from these quantizers gives float layers back unrounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from dwt_ds.config.quantization import Quantization

_INTEGER_TYPES = {bits: getattr(torch, f"int{bits}") for bits in range(2, 9)}


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded weight: `codes * scales`, a scale for each run of inputs.

    codes: (out, in) int8, whatever the number of bits.
    scales: (out, groups) fp32.
    """

    codes: Tensor
    scales: Tensor

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(out, in) weight in the given dtype."""
        rows, columns = self.codes.shape
        grouped = self.codes.to(torch.float32).view(rows, self.scales.shape[1], -1)
        return (grouped * self.scales[:, :, None]).view(rows, columns).to(dtype)


def prepare(model: PreTrainedModel, quantization: Quantization) -> list[str]:
    """Puts fake quantizers into the chosen layers, in place, switched on from the first step.

    Args:
        model: any Hugging Face encoder, with a masked-LM head or another.
        quantization: from `parse_quantization`.

    Returns:
        Names of the layers concerned.

    Raises:
        ValueError: torchao is absent, a layer's inputs do not divide into groups, or nothing to quantize.
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
    return chosen


def check_quantization(config: PretrainedConfig, quantization: Quantization) -> None:
    """Whether a masked language model of this configuration can be quantized so; no weights are allocated.

    Raises:
        ValueError: torchao is absent, a layer's inputs do not divide into groups, or nothing to quantize.
    """
    _torchao_qat()
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    quantized_layers(model, quantization)


def quantized_layers(model: PreTrainedModel, quantization: Quantization) -> list[str]:
    """Names of the linear layers and tables that the settings choose, in the model's order.

    Raises:
        ValueError: none is chosen, or one's inputs do not divide into groups.
    """
    base = model.base_model
    inside = {f"{model.base_model_prefix}.{name}" for name, _ in base.named_modules()} if base is not model else set()
    decoder = model.get_output_embeddings()
    tied = decoder is not None and decoder.weight is model.get_input_embeddings().weight
    chosen = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            part = "embeddings"
        elif not isinstance(module, nn.Linear) or "pooler" in name:
            continue
        elif module is decoder and tied:
            part = "embeddings"
        else:
            part = "encoder" if name in inside else "head"
        if part not in quantization.modules:
            continue
        inputs = module.weight.shape[1]
        if quantization.group_size is not None and inputs % quantization.group_size:
            raise ValueError(
                f"student.quantization.group_size={quantization.group_size} does not divide the {inputs} inputs of "
                f"{name}; choose one that divides the model's widths"
            )
        chosen.append(name)
    if not chosen:
        raise ValueError(f"student.quantization.modules={list(quantization.modules)} chooses no layer of this model")
    return chosen


def enable(model: nn.Module, enabled: bool) -> None:
    """Switches all fake quantizers on or off; call it with `step >= start_step`, after a resume too."""
    for quantizer in _fake_quantizers(model):
        quantizer.enabled = enabled


def is_enabled(model: nn.Module) -> bool:
    """Whether the forward pass rounds anything."""
    return any(quantizer.enabled for quantizer in _fake_quantizers(model))


@torch.no_grad()
def convert(model: PreTrainedModel) -> dict[str, QuantizedWeight]:
    """Rounds the weights of a prepared model in place, for good; activations keep being rounded as in training.

    A channel of a rounded layer holds at most 2**weight_bits values (each group of it, with groups). The model stays in
    Hugging Face's layout: `save_pretrained` writes a folder that plain transformers loads.

    Returns:
        Codes and scales by parameter name, for `dwt_ds.models.quantized_export`. Rounding is not idempotent, so they
        cannot be found again from the rounded weights.
    """
    enable(model, True)
    rounded: dict[str, QuantizedWeight] = {}
    done: set[int] = set()
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_fake_quantizer", None)
        if quantizer is None:
            continue
        weight = module.weight
        if id(weight) not in done:  # a tied decoder comes twice
            rounded[f"{name}.weight"] = _round(weight, quantizer)
            done.add(id(weight))
    drop_weight_quantizers(model)
    return rounded


def drop_weight_quantizers(model: nn.Module) -> None:
    """Uses the weights as they are from now on; activations keep being rounded."""
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


def _fake_quantizers(model: nn.Module) -> list[Any]:
    found = []
    for module in model.modules():
        for name in ("weight_fake_quantizer", "activation_fake_quantizer"):
            if getattr(module, name, None) is not None:
                found.append(getattr(module, name))
    return found


def _is_table(model: PreTrainedModel, module: nn.Module) -> bool:
    """Weights only: tables have no activations, and the decoder's product belongs to the loss."""
    return isinstance(module, nn.Embedding) or module is model.get_output_embeddings()


def _torchao_qat() -> ModuleType:
    try:
        from torchao.quantization import qat
    except ImportError as error:
        raise ValueError(
            "student.quantization needs torchao, which is not installed; pip install torchao, or set it to none"
        ) from error
    return qat
