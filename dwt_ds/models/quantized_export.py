"""A quantized model on disk: int8 codes and their scales in one safetensors file beside the Hugging Face config.

The ordinary export of a converted model is a plain Hugging Face folder too, but in float; this one is smaller (codes
take one byte each, 4-bit ones as well), and remembers that activations are rounded.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dwt_ds.base.files import replace_folder
from dwt_ds.config.quantization import Quantization, parse_quantization
from dwt_ds.models.build import attention_implementation, longest_row
from dwt_ds.models.quantization import QuantizedWeight, convert, drop_weight_quantizers, prepare, quantized_layers

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


def write_quantized(
    model: PreTrainedModel,
    quantization: Quantization,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Rounds a copy of a trained model and writes it, after reading it back and comparing.

    Args:
        model: plain, on the CPU; it stays as it is.
        quantization: for a masked language model, what it was trained with.
        folder: replaced if it exists; a half-written one never stands under this name.
        tokenizer: written beside the model.

    Raises:
        ValueError: torchao is absent, or the settings do not fit the model.
        RuntimeError: read back, the folder gives another model.
    """
    rounded = copy.deepcopy(model).eval()
    prepare(rounded, quantization)
    weights = convert(rounded)
    where = Path(folder)
    temporary = where.with_name(where.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_quantized(rounded, weights, quantization, temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    _compare(rounded, load_quantized(temporary))
    replace_folder(temporary, where)


def quantize_checkpoint(
    folder: str | os.PathLike[str], settings: str | Mapping[str, Any], out: str | os.PathLike[str]
) -> list[str]:
    """Quantizes a trained model of any head, such as one fine-tuned on a GLUE task.

    Args:
        folder: in Hugging Face format; its tokenizer, if any, goes along.
        settings: `w8a8`, `w4a8` or a mapping, as in `student.quantization`; `start_step` has no meaning here.
        out: written as `write_quantized` does; `load_quantized` reads it.

    Returns:
        Names of the quantized layers.

    Raises:
        FileNotFoundError: no model in `folder`.
        ValueError: wrong settings, torchao absent, or a model of a class that transformers does not have.
    """
    quantization = parse_quantization(settings)
    if quantization is None:
        raise ValueError(f"quantization={settings!r} leaves the model as it is; use w8a8, w4a8 or a mapping")
    where = Path(folder)
    if not (where / "config.json").is_file():
        raise FileNotFoundError(f"model path {str(folder)!r} has no config.json; give a folder in Hugging Face format")
    model_class = _model_class(AutoConfig.from_pretrained(where), where)
    try:
        model = model_class.from_pretrained(where, dtype=torch.float32)
    except SafetensorError as error:
        raise ValueError(f"model path {str(folder)!r} is damaged ({error}); export that model again") from error
    names = quantized_layers(model, quantization)
    has_tokenizer = (where / "tokenizer_config.json").is_file()
    write_quantized(model, quantization, out, AutoTokenizer.from_pretrained(where) if has_tokenizer else None)
    return names


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
    model_class = _model_class(config, where)
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


@torch.no_grad()
def _compare(written: PreTrainedModel, read: PreTrainedModel) -> None:
    """Weights must be the same numbers. Logits may differ a little where the two use different attention kernels:
    what differs in the last bit before an activation is rounded differs by a whole step after it."""
    theirs = dict(read.named_parameters())
    changed = [name for name, ours in written.named_parameters() if not torch.equal(ours, theirs[name])]
    shape = (2, min(16, longest_row(written.config) or 16))
    tokens = torch.randint(0, written.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    expected, got = (each(input_ids=tokens, attention_mask=mask).logits for each in (written, read))
    off = (expected - got).abs().max().item()
    if changed or not off <= 0.02 * expected.abs().max().item():
        raise RuntimeError(f"quantized export: read back, {len(changed)} tensors differ and the logits by {off:.3g}")


def _model_class(config: PretrainedConfig, where: Path) -> Any:
    names = config.architectures or ["nothing"]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise ValueError(f"{str(where)!r}: config.json names {names[0]}, which transformers has not; export it again")
    return model_class
