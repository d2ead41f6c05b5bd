"""A quantized model on disk: int8 codes and their scales in one safetensors file beside the Hugging Face config.

The ordinary export of a converted model is a plain Hugging Face folder too, but in float; this one is smaller (codes
take one byte each, 4-bit ones as well), and remembers that activations are rounded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from dwt_ds.models.build import attention_implementation
from dwt_ds.models.quantization import QuantizedWeight, drop_weight_quantizers, prepare
from dwt_ds.models.quantization_settings import Quantization, parse_quantization

WEIGHTS_FILE = "quantized.safetensors"
SETTINGS_FILE = "quantization.json"


def save_quantized(
    model: PreTrainedModel,
    weights: dict[str, QuantizedWeight],
    quantization: Quantization,
    folder: str | os.PathLike[str],
) -> None:
    """Writes config.json, quantization.json and quantized.safetensors.

    Args:
        model: as `convert` left it.
        weights: what `convert` returned.
        quantization: what the model was prepared with.
        folder: made if it does not exist.
    """
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in weights:
            tensors[f"{name}.codes"] = weights[name].codes.contiguous()
            tensors[f"{name}.scales"] = weights[name].scales.contiguous()
        else:
            tensors[name] = parameter.detach().contiguous()
    save_file(tensors, where / WEIGHTS_FILE, metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(where)
    settings = {**quantization.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")}
    (where / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def load_quantized(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """The model that `save_quantized` wrote, in evaluation mode: rounded weights, activations rounded on the fly.

    Raises:
        FileNotFoundError: the folder is no such export.
        ValueError: its files do not belong together, or are damaged.
    """
    where = Path(folder)
    if not (where / SETTINGS_FILE).is_file() or not (where / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {SETTINGS_FILE} with {WEIGHTS_FILE}; give a quantized export")
    settings = json.loads((where / SETTINGS_FILE).read_text())
    dtype = getattr(torch, settings.pop("dtype"))
    quantization = parse_quantization(settings)
    assert quantization is not None
    try:
        stored = load_file(where / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{str(where / WEIGHTS_FILE)!r} is damaged ({error}); export the model again") from error
    config = AutoConfig.from_pretrained(where)
    model_class = getattr(transformers, config.architectures[0])
    attention = attention_implementation("auto", model_class)
    model: PreTrainedModel = model_class._from_config(config, attn_implementation=attention).to(dtype).eval()
    prepare(model, quantization)
    drop_weight_quantizers(model)
    missing = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = stored.get(name)
            if f"{name}.codes" in stored:
                value = QuantizedWeight(stored[f"{name}.codes"], stored[f"{name}.scales"]).dequantized(dtype)
            if value is None or value.shape != parameter.shape:
                missing.append(name)
            else:
                parameter.copy_(value)
    if missing:
        raise ValueError(f"{str(where / WEIGHTS_FILE)!r} lacks {missing[0]} of its config.json; export the model again")
    return model
