"""Runs with gates in the soft loss, and what a resume without them says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from harness.runs import back_to

Train = Callable[..., tuple[int, str]]


def test_a_run_with_gates_and_its_resumes(train: Train, tiny_recipe: Path, tmp_path: Path) -> None:
    run, resumed, other = tmp_path / "run", tmp_path / "resumed", tmp_path / "other"
    settings = [*("train.max_steps=4", "train.log_every=1", "train.checkpoint_every=2", "train.keep_last=9")]
    settings += ["distill.soft_weight=4", "distill.gate_width=0.5"]
    code, output = train(2, [str(tiny_recipe), f"output_dir={run}", *settings])
    assert code == 0, output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "hard_loss" in row]
    for row in logged:
        gate = (row["loss"] - row["hard_loss"]) / (4 * row["soft_loss"])
        assert 0 < gate < 1
        assert f" + 4 x soft {row['soft_loss']:.4f} x gate {gate:.2f}  lr " in output
    back_to(2, run, resumed)
    code, output = train(2, [str(tiny_recipe), f"output_dir={resumed}", *settings])
    assert code == 0, output
    again = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in again if "hard_loss" in row] == [row["loss"] for row in logged]
    back_to(2, run, other)
    code, output = train(2, [str(tiny_recipe), f"output_dir={other}", *settings, "distill.gate_width=null"])
    assert code == 0, output
    assert "distill.gate_width: 0.5 -> None" in output
