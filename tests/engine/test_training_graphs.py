"""When the student's passes are recorded and replayed; on a CPU by a stand-in that repeats them, see test_gpu.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Train = Callable[..., tuple[int, str]]
REPLAYING = str(Path(__file__).parent / "replaying_pretrain.py")
COMMON = ["train.max_steps=8", "train.eval_every=3", "train.gradient_accumulation_steps=2", "student.dropout=0.1"]


def logged(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "hard_loss", "soft_loss", "grad_norm", "eval_hard_loss")
    return [{key: row[key] for key in keys if key in row} for row in rows]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        pytest.param(1, [], marks=pytest.mark.slow, id="one rank"),
        pytest.param(2, ["deepspeed_config=zero2_bf16"], id="two ranks in bf16"),
        pytest.param(1, ["distill.soft_positions=0.3", "teacher.release=auto"], id="further positions"),
    ],
)
def test_a_run_that_replays_its_passes_is_the_run(
    ranks: int, settings: list[str], train: Train, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Losses, norms and dropout, with evaluations in between, to the last bit."""
    runs = {}
    for mode in ("off", "all"):
        arguments = [str(tiny_recipe), f"output_dir={tmp_path / mode}", *COMMON, *settings, f"train.cuda_graphs={mode}"]
        code, output = train(ranks, arguments, program=[REPLAYING])
        assert code == 0, output
        runs[mode] = logged(tmp_path / mode)
        replays = json.loads(re.findall(r"replays (\[.*\])", output)[-1])
        assert (max(replays, default=0) > 8) == (mode == "all"), output
    assert runs["all"] == runs["off"]
