"""Trained models from a folder or from the Hugging Face hub, and what tells two versions of their weights apart."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import torch
from huggingface_hub import model_info, try_to_load_from_cache
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from dwt_ds.base.files import add_to_digest
from dwt_ds.base.words import one_line
from dwt_ds.models.build import attention_implementation, masked_lm_class

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_ADAPTER = "adapter_config.json"


def load_masked_lm(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A trained masked language model, in evaluation mode.

    Weights are read from safetensors, or from pickles as tensors only (`weights_only`).

    Args:
        path: a folder in Hugging Face format, or a model's name on the hub; `~` is the home folder.
        dtype: of the weights; None: the checkpoint's.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: not a masked language model, weights that are missing or not finite, an adapter that is not merged,
            or code that was not allowed to run.
    """
    where = os.path.expanduser(path)
    config = load_model_config(path, trust_remote_code=trust_remote_code)
    try:
        model, report = AutoModelForMaskedLM.from_pretrained(
            where,
            config=config,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention_implementation("auto", masked_lm_class(config)),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except Exception as error:  # safetensors, pickle and each model class raise what they like
        kind, fix = (FileNotFoundError, "; export that model again") if isinstance(error, OSError) else (ValueError, "")
        raise kind(f"model path {where!r}: {one_line(error, with_type=True)}{fix}") from error
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, theirs, ours = mismatched[0]
        raise ValueError(
            f"model path {where!r}: {name} is {tuple(theirs)} in its weights and {tuple(ours)} by its config.json; "
            "give the config.json that belongs to these weights"
        )
    absent = sorted(report["missing_keys"])
    if absent:
        raise ValueError(
            f"model path {where!r} lacks {len(absent)} of the weights of {type(model).__name__}, first {absent[0]}; "
            "give a checkpoint with its masked-LM head"
        )
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"model path {where!r}: {len(broken)} of its weights have values that are not finite (NaN or infinity), "
            f"first {broken[0]}; give another checkpoint of it"
        )
    return model.eval()


def load_model_config(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the model that `load_masked_lm` would load, and its errors; no weights are read."""
    where = os.path.expanduser(path)
    check_exists(where)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:
        fix = "give a folder in Hugging Face format"
        if "trust_remote_code" in str(error) and not trust_remote_code:
            fix = "read the code that comes with it, then set trust_remote_code=true"
        raise ValueError(f"model path {where!r}: {one_line(error, with_type=True)}; {fix}") from error
    own_code = getattr(config, "auto_map", None) or {}
    if masked_lm_class(config) is None and not (trust_remote_code and "AutoModelForMaskedLM" in own_code):
        raise ValueError(
            f"model path {where!r} is a {config.model_type!r}, which has no masked-LM class; give another model"
        )
    return config


def weights_origin(path: str | None, *, trust_remote_code: bool = False) -> str | None:
    """A short text that tells two versions of a model's weights apart; None for no path.

    It is the sha256 over the weight files of a local folder, or the revision of a model on the hub, whose configuration
    may need `trust_remote_code`. Errors are those of `load_model_config`.
    """
    if path is None:
        return None
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        config = load_model_config(path, trust_remote_code=trust_remote_code)
        return f"revision {getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for pattern in _WEIGHTS:
        for file in sorted(folder.glob(pattern)):
            add_to_digest(digest, file)
    return f"sha256 {digest.hexdigest()}"


def check_exists(where: str) -> None:
    """Refuse a path that is neither a whole model's folder nor a model of the hub (FileNotFoundError, ValueError)."""
    folder = Path(where)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model path {where!r} has no config.json; give a folder in Hugging Face format")
        if (folder / _ADAPTER).is_file():  # transformers without peft loads the weights alone, and says nothing
            raise ValueError(f"model path {where!r} holds an adapter ({_ADAPTER}); merge it into the weights first")
        return
    fix = "train that model first, or correct the path (a finished run's model is in its export/)"
    could_be_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", where) is not None
    if not could_be_name or (folder.parent != Path() and folder.parent.exists()):
        raise FileNotFoundError(f"model path {where!r} does not exist; {fix}")
    if isinstance(try_to_load_from_cache(where, "config.json"), str):
        return
    try:
        model_info(where, timeout=10)
    except Exception as error:  # no network, offline mode, no such name: all mean that there is no such model here
        raise FileNotFoundError(
            f"model path {where!r} is not a folder here, and Hugging Face gave no model of that name "
            f"({type(error).__name__}); {fix}"
        ) from error
