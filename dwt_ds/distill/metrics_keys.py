"""Held-out cross-entropies as the evaluation rows of metrics.jsonl have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EVAL_LOSS = "eval_hard_loss"
"""The key of the data folder's own."""


def eval_key(name: str) -> str:
    """The key of a set of `train.eval_sets`; "" is the data folder."""
    return f"{EVAL_LOSS}.{name}" if name else EVAL_LOSS


def eval_losses(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The losses of a row by the name of their set; "" is the data folder.

    Nats per masked token; None for one that was not finite. Empty for a row that is not of an evaluation.
    """
    keys = [key.partition(".") for key in row]
    return {name: row[eval_key(name)] for kind, _, name in keys if kind == EVAL_LOSS}
