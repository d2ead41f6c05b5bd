"""The student from its settings. Everything is checked by name and size before anything large is allocated."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Set
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from typing_extensions import NotRequired, Unpack

from dwt_ds.base.words import nearest, one_line
from dwt_ds.config.schema import AttentionChoice, StudentConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By their names in recipes and in DeepSpeed's JSON."""

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
# What a family's configuration may call these.
_INTERMEDIATE_FIELDS = ("intermediate_size", "hidden_dim", "ffn_dim", "feed_forward_size")
_DROPOUT_FIELDS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "embedding_dropout",
    "mlp_dropout",
)
# Of BigBird: its sparse attention turns into this for good at the first short row, and an export would be sparse again.
_FULL_ATTENTION = "original_full"
# Fields that student.config must not set, and what sets them.
_SET_BY = {
    "vocab_size": "the data folder",
    "pad_token_id": "the data folder",
    "mask_token_id": "the data folder",
    "num_hidden_layers": "student.layers",
    "hidden_size": "student.hidden_size",
    "num_attention_heads": "student.num_heads",
    "intermediate_size": "student.intermediate_size",
    "max_position_embeddings": "student.max_positions",
    "attn_implementation": "student.attention",
}


class DataSizes(TypedDict):
    """What the data folder and its tokenizer decide of a student."""

    vocab_size: int
    """Tokens of the tokenizer."""
    seq_len: int
    """Tokens per row."""
    pad_token_id: int
    cls_token_id: NotRequired[int | None]
    sep_token_id: NotRequired[int | None]
    mask_token_id: NotRequired[int | None]
    """ESM's token dropout needs it."""


def data_sizes(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, seq_len: int) -> DataSizes:
    """Those of a data folder with this tokenizer."""
    return DataSizes(
        vocab_size=vocab_size,
        seq_len=seq_len,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )


def student_model_config(student: StudentConfig, **data: Unpack[DataSizes]) -> PretrainedConfig:
    """The Hugging Face configuration of the student; nothing is allocated.

    Raises:
        ValueError: one line (field, value, fix): an unknown family, heads that do not divide the width or are too odd
            for rotary positions, rows longer than the positions, unknown or misplaced fields or unknown activations in
            `student.config`.
    """
    if student.family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        fix = nearest(student.family, MODEL_FOR_MASKED_LM_MAPPING_NAMES) or "; use bert, roberta or modernbert, say"
        raise ValueError(
            f"student.family={student.family!r}: transformers has no masked-LM class for this model type{fix}"
        )
    defaults = AutoConfig.for_model(student.family)
    if defaults.is_encoder_decoder:
        raise ValueError(
            f"student.family={student.family!r}: it has a decoder beside the encoder, and the recipe has the sizes of "
            "one of them only; choose a family of encoders"
        )
    _check_sizes(student, data["seq_len"], defaults)
    beginning, end, pad = data.get("cls_token_id"), data.get("sep_token_id"), data["pad_token_id"]
    decided = {
        "vocab_size": data["vocab_size"],
        "pad_token_id": pad,
        "bos_token_id": beginning,
        "eos_token_id": end,
        "cls_token_id": beginning,
        "sep_token_id": end,
        "mask_token_id": data.get("mask_token_id"),
        "attention_type": _FULL_ATTENTION,
        "num_hidden_layers": student.layers,
        "hidden_size": student.hidden_size,
        "num_attention_heads": student.num_heads,
        "max_position_embeddings": student.max_positions + _position_offset(defaults, pad),
        **dict.fromkeys(_INTERMEDIATE_FIELDS, student.intermediate_size or 4 * student.hidden_size),
        **dict.fromkeys(_DROPOUT_FIELDS, student.dropout),
    }
    known = {name for name in vars(defaults) if not name.startswith("_")} | set(type(defaults).attribute_map)
    _check_has_sizes(student, known)
    further = set() if known.issuperset(student.config) else _further_fields(defaults)
    _check_extra_fields(student, defaults, known | further)
    settings = {name: value for name, value in decided.items() if name in known} | student.config
    try:
        return AutoConfig.for_model(student.family, **settings)
    except Exception as error:  # each configuration class raises what it likes
        raise ValueError(_refused(student, error)) from error


def _check_has_sizes(student: StudentConfig, known: Set[str]) -> None:
    """Refuse sizes that the family's configuration, with the fields `known`, has no place for (ValueError)."""
    for name in ("num_hidden_layers", "hidden_size"):
        if name not in known:
            raise ValueError(
                f"student.family={student.family!r}: its configuration has no {name}, so that {_SET_BY[name]} "
                "would change nothing; choose another family"
            )
    if student.intermediate_size is not None and known.isdisjoint(_INTERMEDIATE_FIELDS):
        raise ValueError(
            f"student.intermediate_size={student.intermediate_size}: the family {student.family!r} has no such size; "
            "remove it"
        )


def build_student(student: StudentConfig, **data: Unpack[DataSizes]) -> PreTrainedModel:
    """A randomly initialised student in fp32, in training mode; call `torch.manual_seed` before it.

    Raises ValueError as `student_model_config` does, and for an attention implementation that the family or the machine
    lacks.
    """
    config = student_model_config(student, **data)
    implementation = attention_implementation(student.attention, masked_lm_class(config))
    try:
        model = AutoModelForMaskedLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    except Exception as error:  # each model class raises what it likes
        if _builds_with_eager_attention(config):
            reason = one_line(error, with_type=True)
            raise ValueError(f"student.attention={student.attention!r}: {reason}; use eager or auto") from error
        raise ValueError(_refused(student, error)) from error
    return model.train()


def check_attention(choice: AttentionChoice, model_class: Any) -> None:
    """Refuse an implementation of `student.attention` that transformers' class does not have (ValueError).

    For a plan, which builds the student with another implementation; `build_student` refuses it as well.
    """
    has = {"sdpa": model_class._supports_sdpa, "flash_attention_2": model_class._supports_flash_attn}
    if not has.get(choice, True):
        raise ValueError(f"student.attention={choice!r}: {model_class.__name__} does not have it; use eager or auto")


def attention_implementation(choice: AttentionChoice, model_class: Any = None) -> str:
    """The implementation that `student.attention` stands for on this machine; eager beat sdpa on the CPUs measured.

    `model_class` is transformers' class of the model; None: one that supports sdpa.
    """
    if choice != "auto":
        return choice
    supported = model_class is None or model_class._supports_sdpa
    return "sdpa" if torch.accelerator.is_available() and supported else "eager"


def masked_lm_class(config: PretrainedConfig) -> Any:
    """The masked-LM class of transformers itself for this configuration, or None."""
    known = type(config) in AutoModelForMaskedLM._model_mapping
    return AutoModelForMaskedLM._model_mapping[type(config)] if known else None


def longest_row(config: PretrainedConfig) -> int | None:
    """Tokens of the longest row that a model can read; None if its positions are not a table."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    return positions - first_position(config)


def first_position(config: PretrainedConfig) -> int:
    """The row of the position table that the first token of a text uses."""
    return _position_offset(config, getattr(config, "pad_token_id", None) or 0)


def check_row_length(field: str, seq_len: int, longest: int | None, fix: str) -> None:
    """Refuse rows of `seq_len` tokens for a model with positions for `longest` (ValueError)."""
    if longest is not None and seq_len > longest:
        raise ValueError(
            f"{field}: the rows have {seq_len} tokens, the model has positions for {longest}; prepare shorter rows, or "
            f"{fix}"
        )


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _position_offset(config: PretrainedConfig, pad_token_id: int) -> int:
    """Rows of the position table that no token uses."""
    if config.model_type not in _OFFSET_POSITIONS:
        return 0
    return 2 if config.model_type == "mpnet" else pad_token_id + 1


def _check_sizes(student: StudentConfig, seq_len: int, defaults: PretrainedConfig) -> None:
    """Heads must divide the width, rows must fit the positions, and rotary positions, which turn pairs of channels,
    need heads of even width (ValueError)."""
    if student.hidden_size % student.num_heads:
        raise ValueError(
            f"student.num_heads={student.num_heads} does not divide student.hidden_size={student.hidden_size}; "
            "choose a number of heads that does"
        )
    longest = student.max_positions
    check_row_length(f"student.max_positions={longest}", seq_len, longest, f"set it to {seq_len} or more")
    positions = student.config.get("position_embedding_type", getattr(defaults, "position_embedding_type", None))
    rotary = positions == "rotary" or getattr(defaults, "rope_parameters", None) or student.family == "roformer"
    width = student.hidden_size // student.num_heads
    if rotary and width % 2:
        raise ValueError(
            f"student.num_heads={student.num_heads} makes heads of {width} channels (student.hidden_size="
            f"{student.hidden_size}), and the rotary positions of {student.family!r} need an even width per head; "
            "choose another number of heads or width"
        )


def _check_extra_fields(student: StudentConfig, defaults: PretrainedConfig, known: set[str]) -> None:
    """Refuse fields of `student.config` that the family lacks or that another setting decides, and unknown activations
    (ValueError). `known` are the names that the family's configuration has."""
    aliases = {own: general for general, own in type(defaults).attribute_map.items()}
    for name, value in student.config.items():
        if name not in known:
            fix = nearest(name, sorted(known)) or "; remove it"
            raise ValueError(f"student.config.{name} is not a field of {type(defaults).__name__}{fix}")
        general = "intermediate_size" if name in _INTERMEDIATE_FIELDS else aliases.get(name, name)
        if general in _SET_BY:
            raise ValueError(f"student.config.{name} is set by {_SET_BY[general]}; remove it here")
        if name == "attention_type" and value == "block_sparse":
            raise ValueError(
                f"student.config.{name}={value!r}: a short row ends it for good in transformers; use {_FULL_ATTENTION}"
            )
        if name.endswith(("_act", "activation")) and isinstance(value, str) and value not in ACT2FN:
            fix = nearest(value, ACT2FN) or "; use gelu, relu or silu, say"
            raise ValueError(f"student.config.{name}={value!r} is not an activation of transformers{fix}")


def _further_fields(config: PretrainedConfig) -> set[str]:
    """Fields that a family's models read where they are set, and its configuration class does not list, such as
    `share_att_key` and `position_buckets` of DeBERTa-v3."""
    code = inspect.getsource(sys.modules[masked_lm_class(config).__module__])
    return set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', code))


def _builds_with_eager_attention(config: PretrainedConfig) -> bool:
    try:
        with torch.device("meta"):
            AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
    except Exception:  # the same error as before: the attention is not to blame
        return False
    return True


def _refused(student: StudentConfig, error: Exception) -> str:
    """Why a family's classes refuse their settings; the recipe's own extra fields, if any, are the likely cause."""
    cause = f"student.config={student.config}" if student.config else f"student.family={student.family!r}"
    return f"{cause}: {one_line(error, with_type=True)}"
