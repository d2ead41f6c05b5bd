"""What the axes of every parameter mean, in the families that can be grown.

An axis is named after its size: hidden, heads (attention heads x head size), ffn, embedding (the width of the token
tables, which is the hidden size except in ELECTRA and ALBERT), and the counts vocab, positions and types, which no
width method changes. "3 heads" and "2 ffn" are such axes stacked in one matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["table", "linear", "bias", "vector", "head norm", "decoder"]

GROWABLE_FAMILIES = (
    "bert",
    "roberta",
    "distilbert",
    "modernbert",
    "electra",
    "albert",
    "camembert",
    "xlm-roberta",
)
COUNTS = frozenset({"vocab", "positions", "types"})


@dataclass(frozen=True)
class Layout:
    """How one parameter is grown."""

    kind: Kind
    """table (rows are looked up), linear (axis 0 out, axis 1 in), bias (a linear layer's), vector (one value per
    channel), head norm (the last LayerNorm before the decoder), decoder (the output layer's weight, if it is not tied
    to a table)."""
    axes: tuple[str, ...]
    """Names of the parameter's axes."""


# Modules by the end of their name; `layout_of` tells `.weight` and `.bias` apart. The first match counts.
_MODULES: tuple[tuple[str, Kind, tuple[str, ...]], ...] = (
    (r"(word|tok)_embeddings", "table", ("vocab", "embedding")),
    (r"position_embeddings", "table", ("positions", "embedding")),
    (r"token_type_embeddings", "table", ("types", "embedding")),
    (r"embeddings\.(LayerNorm|norm)", "vector", ("embedding",)),
    (r"embeddings_project|embedding_hidden_mapping_in", "linear", ("hidden", "embedding")),
    (r"attention\.(self\.)?(query|key|value)|attention\.[qkv]_lin", "linear", ("heads", "hidden")),
    (r"attn\.Wqkv", "linear", ("3 heads", "hidden")),
    (r"attention\.(output\.)?dense|attention\.out_lin|attn\.Wo", "linear", ("hidden", "heads")),
    (r"intermediate\.dense|albert_layers\.\d+\.ffn|ffn\.lin1", "linear", ("ffn", "hidden")),
    (r"mlp\.Wi", "linear", ("2 ffn", "hidden")),
    (r"output\.dense|ffn_output|ffn\.lin2|mlp\.Wo", "linear", ("hidden", "ffn")),
    (
        r"(generator_)?predictions(\.transform)?\.LayerNorm|lm_head\.layer_norm|vocab_layer_norm|^head\.norm",
        "head norm",
        ("embedding",),
    ),
    (
        r"(generator_)?predictions(\.transform)?\.dense|lm_head\.dense|vocab_transform|^head\.dense",
        "linear",
        ("embedding", "hidden"),
    ),
    (
        r"(attention|output)\.LayerNorm|full_layer_layer_norm|(sa|output)_layer_norm|attn_norm|mlp_norm|final_norm",
        "vector",
        ("hidden",),
    ),
    (
        r"decoder|vocab_projector|generator_lm_head|^predictions|cls\.predictions|lm_head",
        "decoder",
        ("vocab", "embedding"),
    ),
)
_PATTERNS = tuple((re.compile(rf"(^|\.)({pattern})$"), kind, axes) for pattern, kind, axes in _MODULES)
_LAYER = re.compile(r"\.layers?\.(\d+)\.")


def layout_of(name: str) -> Layout | None:
    """The layout of the parameter of this name; None if it is unknown."""
    module, _, leaf = name.rpartition(".")
    for pattern, kind, axes in _PATTERNS:
        if pattern.search(module):
            if leaf == "weight" or kind in ("vector", "head norm"):
                return Layout(kind, axes)
            return Layout("bias" if kind == "linear" else "vector", axes[:1])
    return None


def layer_of(name: str) -> int | None:
    """Index of the layer that the parameter belongs to; None outside the layers, and in ALBERT's shared ones."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def in_layer(name: str, layer: int) -> str:
    """The name of the same parameter in another layer."""
    return _LAYER.sub(lambda found: found.group(0).replace(found.group(1), str(layer)), name, count=1)
