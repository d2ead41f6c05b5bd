"""What a recipe's student section may ask for, checked by the names of its fields before anything is built."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dwt_ds.base.words import nearest
from dwt_ds.config.schema import StudentConfig

INTERMEDIATE_FIELDS = ("intermediate_size", "hidden_dim", "ffn_dim")
_DECIDED_ELSEWHERE = {
    "vocab_size": "the data folder",
    "pad_token_id": "the data folder",
    "num_hidden_layers": "student.layers",
    "hidden_size": "student.hidden_size",
    "num_attention_heads": "student.num_heads",
    "intermediate_size": "student.intermediate_size",
    "max_position_embeddings": "student.max_positions",
    "attn_implementation": "student.attention",
}


def check_family(family: str) -> None:
    """Whether transformers has a masked-LM class of this model type (ValueError with the nearest)."""
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return
    fix = nearest(family, MODEL_FOR_MASKED_LM_MAPPING_NAMES) or "; use bert, roberta, distilbert or modernbert, say"
    raise ValueError(f"student.family={family!r} is no Hugging Face model type with a masked-LM class{fix}")


def check_sizes(student: StudentConfig, seq_len: int) -> None:
    """Whether the heads divide the width and the positions hold rows of `seq_len` tokens (ValueError)."""
    if student.hidden_size % student.num_heads:
        raise ValueError(
            f"student.num_heads={student.num_heads} does not divide student.hidden_size={student.hidden_size}; "
            "choose a number of heads that does"
        )
    if seq_len > student.max_positions:
        raise ValueError(
            f"student.max_positions={student.max_positions} is shorter than the data folder's rows of {seq_len} tokens;"
            f" set student.max_positions to {seq_len} or more, or prepare shorter rows"
        )


def with_aliases(config: PretrainedConfig) -> set[str]:
    """Names that this configuration class knows, by their own and by their general name."""
    return {name for name in vars(config) if not name.startswith("_")} | set(type(config).attribute_map)


def checked_extras(student: StudentConfig, defaults: PretrainedConfig, fields: set[str]) -> dict[str, Any]:
    """`student.config`, every name and every activation in it known.

    Args:
        defaults: the family's configuration as transformers has it.
        fields: its `with_aliases`.

    Raises:
        ValueError: a field that the family lacks, one that is decided elsewhere, or an unknown activation.
    """
    aliases = {own: general for general, own in type(defaults).attribute_map.items()}
    for name, value in student.config.items():
        if name not in fields:
            fix = nearest(name, sorted(fields)) or "; remove it"
            raise ValueError(f"student.config.{name} is no field of {type(defaults).__name__}{fix}")
        general = "intermediate_size" if name in INTERMEDIATE_FIELDS else aliases.get(name, name)
        if general in _DECIDED_ELSEWHERE:
            raise ValueError(f"student.config.{name} is decided by {_DECIDED_ELSEWHERE[general]}; remove it here")
        if name.endswith(("_act", "activation")) and isinstance(value, str) and value not in ACT2FN:
            fix = nearest(value, ACT2FN) or "; use gelu, relu or silu, say"
            raise ValueError(f"student.config.{name}={value!r} is no activation of transformers{fix}")
    return dict(student.config)


def check_head_width(student: StudentConfig, defaults: PretrainedConfig) -> None:
    """Whether the heads are of even width where positions are rotary: those turn pairs of channels (ValueError).

    `defaults` is the family's configuration as transformers has it.
    """
    kind = student.config.get("position_embedding_type", getattr(defaults, "position_embedding_type", None))
    rotary = kind == "rotary" or getattr(defaults, "rope_parameters", None) or student.family == "roformer"
    width = student.hidden_size // student.num_heads
    if rotary and width % 2:
        raise ValueError(
            f"student.num_heads={student.num_heads} makes heads of {width} channels (student.hidden_size="
            f"{student.hidden_size}), and the rotary positions of {student.family!r} need an even width per head; "
            "choose another number of heads or width"
        )
