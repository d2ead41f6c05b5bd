"""A quantized model on disk: int8 codes and their scales in a safetensors file beside the Hugging Face config.

A converted model can also be saved as a plain Hugging Face folder in float. This format is smaller (each code takes one
byte, 4-bit codes too) and records how activations are rounded.
"""

from __future__ import annotations

import copy
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
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dwt_ds.base.files import read_json, replace_folder, unfinished_folder, write_json
from dwt_ds.config.quantization import Quantization, parse_quantization
from dwt_ds.config.validate import validated
from dwt_ds.data.tokenizer import load_tokenizer, save_tokenizer
from dwt_ds.models.build import attention_implementation, longest_row
from dwt_ds.models.load import check_exists
from dwt_ds.models.quantization import (
    QuantizedWeight,
    add_fake_quantizers,
    drop_weight_quantizers,
    quantized_layers,
    round_weights,
)
from dwt_ds.models.tokenizers import fit_to_model

WEIGHTS_FILE = "quantized.safetensors"
SETTINGS_FILE = "quantization.json"


def save_quantized(
    model: PreTrainedModel,
    weights: dict[str, QuantizedWeight],
    quantization: Quantization,
    folder: str | os.PathLike[str],
) -> None:
    """Write config.json, quantization.json and quantized.safetensors to a folder, created if it does not exist.

    `weights` is what `round_weights` returned for this model.
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
    write_json(where / SETTINGS_FILE, settings)


def write_quantized(
    model: PreTrainedModel,
    quantization: Quantization,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Round a copy of a trained model, without quantizers and on the CPU; write it, read it back and compare.

    The folder is replaced if it exists; a half-written one never has this name.

    Raises:
        ValueError: torchao is not installed, or the settings do not fit the model.
        RuntimeError: the folder, read back, gives another model.
    """
    rounded = copy.deepcopy(model).eval()
    add_fake_quantizers(rounded, quantization)
    weights = round_weights(rounded)
    where = Path(folder)
    temporary = unfinished_folder(where)
    shutil.rmtree(temporary, ignore_errors=True)
    save_quantized(rounded, weights, quantization, temporary)
    if tokenizer is not None:
        save_tokenizer(tokenizer, temporary)
    _compare(rounded, load_quantized(temporary))
    replace_folder(temporary, where)


def quantize_checkpoint(
    folder: str | os.PathLike[str], settings: str | Mapping[str, Any], out: str | os.PathLike[str]
) -> list[str]:
    """Quantize a trained model with any head, such as one fine-tuned on a GLUE task.

    Args:
        folder: in Hugging Face format; its tokenizer, if any, is copied and fitted to the model.
        settings: `w8a8`, `w4a8` or a mapping, as in `student.quantization`; `start_step` is ignored.
        out: written by `write_quantized`; `load_quantized` reads it.

    Returns:
        Names of the quantized layers.

    Raises:
        FileNotFoundError: no model in `folder`.
        ValueError: wrong settings, torchao is not installed, or a model class that transformers does not have.
    """
    quantization = parse_quantization(settings, "quantization")
    if quantization is None:
        raise ValueError(f"quantization={settings!r} does not change the model; use w8a8, w4a8 or a mapping")
    where = Path(folder)
    check_exists(str(where))
    model_class = _model_class(AutoConfig.from_pretrained(where), where)
    try:
        model = model_class.from_pretrained(where, dtype=torch.float32)
    except SafetensorError as error:
        raise ValueError(f"model path {str(folder)!r} is damaged ({error}); export that model again") from error
    names = quantized_layers(model, quantization)
    has_tokenizer = (where / "tokenizer_config.json").is_file()
    tokenizer = fit_to_model(load_tokenizer(where), model.config) if has_tokenizer else None
    write_quantized(model, quantization, out, tokenizer)
    return names


def load_quantized(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """The model that `save_quantized` wrote, in evaluation mode: weights are rounded, activations at each forward pass.

    Raises:
        FileNotFoundError: the folder holds no such export.
        ValueError: its files are damaged or do not belong together.
    """
    where = Path(folder)
    if not (where / SETTINGS_FILE).is_file() or not (where / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {SETTINGS_FILE} with {WEIGHTS_FILE}; give a quantized export")
    settings = read_json(where / SETTINGS_FILE)
    name = settings.pop("dtype", None)
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"{str(where / SETTINGS_FILE)!r}: dtype={name!r} is not one of torch's; export the model again"
        )
    quantization = validated(Quantization, settings, SETTINGS_FILE)
    try:
        stored = load_file(where / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{str(where / WEIGHTS_FILE)!r} is damaged ({error}); export the model again") from error
    config = AutoConfig.from_pretrained(where)
    model_class = _model_class(config, where)
    attention = attention_implementation("auto", model_class)
    model: PreTrainedModel = model_class._from_config(config, attn_implementation=attention).to(dtype).eval()
    add_fake_quantizers(model, quantization)
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
    """Weights must be equal. Logits may differ a little where the two models use different attention kernels: a
    difference in the last bit before an activation is rounded becomes a whole rounding step."""
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
        raise ValueError(f"{str(where)!r}: config.json names {names[0]}, which transformers lacks; export it again")
    return model_class
