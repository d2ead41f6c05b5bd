"""Small masked language models of many families."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

V = 83
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 8},
    "albert": {"embedding_size": 8},
    # Wider than the padding: eager attention in fp64 gives NaN where all is masked.
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 8},
    # As ESM-2 has it: masked tokens are zeroed, and the other ones scaled by their share.
    "esm": {"token_dropout": True, "mask_token_id": 7, "position_embedding_type": "rotary"},
    "distilbert": {"hidden_dim": 24},
}


def tiny(
    family: str,
    *,
    attention: str = "eager",
    layers: int = 2,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    **fields: Any,
) -> PreTrainedModel:
    """Layers x 16 in fp64, in training. No bias is at zero, where a missing one would not show."""
    names = ("dropout", "attention_dropout")
    if family not in ("distilbert", "modernbert"):
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    if family != "modernbert":  # which has none
        fields |= dict(zip(names, (dropout, attention_dropout), strict=True))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        **OWN_FIELDS.get(family, {}),
        **fields,
    )
    model = AutoModelForMaskedLM.from_config(config, attn_implementation=attention).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()
