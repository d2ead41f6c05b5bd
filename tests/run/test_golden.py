"""Losses of a 20-step run, stored: a refactor that changes the arithmetic shows here.

REWRITE_GOLDEN=1 writes them anew, after a change that is meant to change them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from harness.ranks import Train
from harness.runs import completed, rows_of

GOLDEN = Path(__file__).parent.parent / "golden" / "pretrain_20_steps.json"


def test_losses_of_20_steps(train: Train, tiny_recipe: Path, tmp_path: Path) -> None:
    settings = [
        "train.max_steps=20",
        "train.learning_rate=2e-3",
        "train.gradient_accumulation_steps=2",
        "student.dropout=0",
        "distill.soft_weight={schedule: cosine, start: 4, end: 1}",
        "distill.temperature=2",
    ]
    completed(train(2, [str(tiny_recipe), f"output_dir={tmp_path}", *settings]))
    rows = rows_of(tmp_path)
    found = {key: [row[key] for row in rows if key in row] for key in ("hard_loss", "soft_loss", "grad_norm")}
    found["eval_hard_loss"] = [row["eval_hard_loss"] for row in rows if "eval_hard_loss" in row]
    if os.environ.get("REWRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
