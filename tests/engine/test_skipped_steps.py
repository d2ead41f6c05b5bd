"""A gradient that is not finite on one of two ranks: no rank takes the step, under every ZeRO stage and offloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Train = Callable[..., tuple[int, str]]

WHOLE = ["fp32 ZeRO-0", "bf16 ZeRO-0", "fp32 ZeRO-1", "bf16 ZeRO-1", "bf16 ZeRO-2", "fp32 ZeRO-3", "bf16 ZeRO-3"]
WHOLE += ["bf16 ZeRO-2 compiled"]
OFFLOADED = ["fp32 ZeRO-1 offload", "bf16 ZeRO-2 offload", "fp32 ZeRO-3 offload", "bf16 ZeRO-3 offload"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cases", [WHOLE, pytest.param(OFFLOADED, marks=pytest.mark.slow)], ids=["whole", "offloaded"])
def test_a_nan_on_one_rank_skips_the_step_on_all(cases: list[str], train: Train) -> None:
    """Offloading compiles DeepSpeed's CPU Adam, which takes minutes."""
    code, output = train(2, cases, program=[str(Path(__file__).with_name("skipping_ranks.py"))])
    assert code == 0, output
    problems = dict(json.loads(line) for line in output.splitlines() if line.startswith('["'))
    assert problems == dict.fromkeys(cases, []), output
