"""Losses of a 20-step run, stored: a refactor that changes the arithmetic shows here.

REWRITE_GOLDEN=1 writes them anew, after a change that is meant to change them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from harness.runs import rows_of
from harness.tiny import TinyRun

GOLDEN = Path(__file__).parent.parent / "golden" / "pretrain_20_steps.json"


def test_losses_of_20_steps(tiny_run: TinyRun, tmp_path: Path) -> None:
    settings = [
        "train.max_steps=20",
        "train.learning_rate=2e-3",
        "train.gradient_accumulation_steps=2",
        "student.dropout=0",
        "distill.soft_weight={schedule: cosine, start: 4, end: 1}",
        "distill.temperature=2",
    ]
    tiny_run(tmp_path, *settings, ranks=2)
    rows = rows_of(tmp_path)
    keys = ("hard_loss", "soft_loss", "grad_norm", "eval_hard_loss")
    found = {key: [row[key] for row in rows if key in row] for key in keys}
    if os.environ.get("REWRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
