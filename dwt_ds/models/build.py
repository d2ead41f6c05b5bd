"""Models from settings or from a folder, with clear errors before anything large is allocated."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import model_info, try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from dwt_ds.config.schema import StudentConfig
from dwt_ds.models.student_checks import (
    INTERMEDIATE_FIELDS,
    check_family,
    check_head_width,
    check_sizes,
    checked_extras,
    with_aliases,
)

Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]

# Families whose position table starts after the padding index, as RoBERTa's does (its first position is pad + 1).
_OFFSET_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
_DROPOUT_FIELDS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "embedding_dropout",
    "mlp_dropout",
)


def student_model_config(
    student: StudentConfig,
    *,
    vocab_size: int,
    seq_len: int,
    pad_token_id: int,
    cls_token_id: int | None = None,
    sep_token_id: int | None = None,
) -> PretrainedConfig:
    """The Hugging Face configuration of the student; nothing is allocated.

    Args:
        student: the recipe's student section.
        vocab_size: tokens of the data folder's tokenizer.
        seq_len: tokens a row of the data folder.
        pad_token_id, cls_token_id, sep_token_id: the tokenizer's.

    Raises:
        ValueError: one line naming field, value and fix: unknown family, heads that do not divide the width or are
            too odd for rotary positions, rows longer than the positions, unknown or misplaced fields or unknown
            activations in `student.config`.
    """
    check_family(student.family)
    check_sizes(student, seq_len)
    defaults = AutoConfig.for_model(student.family)
    check_head_width(student, defaults)
    fields = with_aliases(defaults)
    decided = {
        "vocab_size": vocab_size,
        "pad_token_id": pad_token_id,
        "bos_token_id": cls_token_id,
        "eos_token_id": sep_token_id,
        "num_hidden_layers": student.layers,
        "hidden_size": student.hidden_size,
        "num_attention_heads": student.num_heads,
        "max_position_embeddings": student.max_positions + position_offset(defaults, pad_token_id),
        **dict.fromkeys(INTERMEDIATE_FIELDS, student.intermediate_size or 4 * student.hidden_size),
        **dict.fromkeys(_DROPOUT_FIELDS, student.dropout),
    }
    for name, value in (("cls_token_id", cls_token_id), ("sep_token_id", sep_token_id)):
        decided[name] = value
    settings = {name: value for name, value in decided.items() if name in fields}
    settings.update(checked_extras(student, defaults, fields))
    try:
        return AutoConfig.for_model(student.family, **settings)
    except Exception as error:  # each configuration class raises what it likes
        raise ValueError(f"{_family_or_config(student)}: {_one_line(error)}") from error


def build_student(
    student: StudentConfig,
    *,
    vocab_size: int,
    seq_len: int,
    pad_token_id: int,
    cls_token_id: int | None = None,
    sep_token_id: int | None = None,
) -> PreTrainedModel:
    """A randomly initialised student in fp32, in training mode; seed it with `torch.manual_seed` before the call.

    Arguments and errors are those of `student_model_config`; also a ValueError for an attention that the family or
    the machine lacks.
    """
    config = student_model_config(
        student,
        vocab_size=vocab_size,
        seq_len=seq_len,
        pad_token_id=pad_token_id,
        cls_token_id=cls_token_id,
        sep_token_id=sep_token_id,
    )
    implementation = attention_implementation(student.attention, _masked_lm_class(config))
    try:
        model = AutoModelForMaskedLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    except Exception as error:  # each model class raises what it likes
        if _builds_with_eager_attention(config):
            told = f"student.attention={student.attention!r}: {_one_line(error)}; use eager or auto"
            raise ValueError(told) from error
        raise ValueError(f"{_family_or_config(student)}: {_one_line(error)}") from error
    return model.train()


def load_masked_lm(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    attention: Attention = "auto",
) -> PreTrainedModel:
    """A trained masked language model, in evaluation mode.

    Weights are read from safetensors, or from pickles as tensors only (`weights_only`).

    Args:
        path: a folder in Hugging Face format, or a model's name there.
        dtype: of the weights; None keeps the checkpoint's.
        trust_remote_code: run Python code that comes with the model.
        attention: auto is eager on a CPU and sdpa on a GPU.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: not a masked language model, weights missing, or code that was not allowed to run.
    """
    where = without_tilde(path)
    _check_folder(where)
    config = _load_config(where, trust_remote_code)
    try:
        model, report = AutoModelForMaskedLM.from_pretrained(
            where,
            config=config,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention_implementation(attention, _masked_lm_class(config)),
            output_loading_info=True,
        )
    except OSError as error:
        raise FileNotFoundError(f"model path {where!r}: {_one_line(error)}; export that model again") from error
    except Exception as error:  # safetensors, pickle and each model class raise what they like
        raise ValueError(f"model path {where!r}: {_one_line(error)}") from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ValueError(
            f"model path {where!r} lacks {len(absent)} of the weights of {type(model).__name__}, first {absent[0]}; "
            "give a checkpoint with its masked-LM head"
        )
    return model.eval()


def attention_implementation(choice: Attention, model_class: Any = None) -> str:
    """The implementation that `student.attention` stands for on this machine; eager beat sdpa on the CPUs measured."""
    if choice != "auto":
        return choice
    supported = model_class is None or model_class._supports_sdpa
    return "sdpa" if torch.accelerator.is_available() and supported else "eager"


def position_offset(config: PretrainedConfig, pad_token_id: int | None = None) -> int:
    """Rows of the position table that no token uses: RoBERTa's positions start after the padding index."""
    if config.model_type not in _OFFSET_POSITIONS:
        return 0
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    return (1 if config.model_type == "mpnet" else pad) + 1


def longest_row(config: PretrainedConfig) -> int | None:
    """Tokens the longest row may have, RoBERTa's offset counted; None where positions are not a table."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions - position_offset(config) if isinstance(positions, int) and positions > 0 else None


def check_row_length(config: PretrainedConfig, seq_len: int, name: str) -> None:
    """Whether rows of `seq_len` tokens fit a model that exists already; `name` is how the error calls it.

    Raises:
        ValueError: they do not.
    """
    longest = longest_row(config)
    if longest is not None and seq_len > longest:
        raise ValueError(
            f"{name}: the model has positions for {longest} tokens, and the data folder's rows have {seq_len}; "
            "prepare shorter rows or use another model"
        )


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def load_model_config(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the model that `load_masked_lm` would load, and its errors; no weights are read."""
    where = without_tilde(path)
    _check_folder(where)
    return _load_config(where, trust_remote_code)


def without_tilde(path: str | os.PathLike[str]) -> str:
    """A model's path with `~` replaced by the home folder, as transformers needs it; a name on the hub stays."""
    return os.path.expanduser(path)


def _masked_lm_class(config: PretrainedConfig) -> Any:
    """The masked-LM class of transformers itself for this configuration, or None."""
    known = type(config) in AutoModelForMaskedLM._model_mapping
    return AutoModelForMaskedLM._model_mapping[type(config)] if known else None


def _builds_with_eager_attention(config: PretrainedConfig) -> bool:
    try:
        with torch.device("meta"):
            AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
    except Exception:  # the same that was raised before: the attention is not to blame
        return False
    return True


def _family_or_config(student: StudentConfig) -> str:
    """What to look at when a family's classes refuse their settings: those that the recipe added, if any."""
    return f"student.config={student.config}" if student.config else f"student.family={student.family!r}"


def _check_folder(where: str) -> None:
    folder = Path(where)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model path {where!r} has no config.json; give a folder in Hugging Face format")
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
            f"model path {where!r} is no folder here, and Hugging Face gave no model of that name "
            f"({type(error).__name__}); {fix}"
        ) from error


def _load_config(where: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:
        advice = "; read the code that comes with it, then set trust_remote_code=true" * (not trust_remote_code)
        advice = advice if "trust_remote_code" in str(error) else "; give a folder in Hugging Face format"
        raise ValueError(f"model path {where!r}: {_one_line(error)}{advice}") from error
    own_code = getattr(config, "auto_map", None) or {}
    if _masked_lm_class(config) is None and not (trust_remote_code and "AutoModelForMaskedLM" in own_code):
        raise ValueError(
            f"model path {where!r} is a {config.model_type!r}, which has no masked-LM class; give another model"
        )
    return config


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300].rstrip('.;:')}"
