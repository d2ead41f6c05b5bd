"""A gradient that is not finite on one of two ranks: no rank takes the step, under every ZeRO stage and offloaded.

When the loss scale of fp16 grows, no gradient is halved.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.rank_cases import problems_of
from harness.ranks import Train
from harness.runs import completed

WHOLE = ["fp32 ZeRO-0", "bf16 ZeRO-0", "fp32 ZeRO-1", "bf16 ZeRO-1", "bf16 ZeRO-2", "fp32 ZeRO-3", "bf16 ZeRO-3"]
WHOLE += ["bf16 ZeRO-2 compiled"]
GROWING = [f"fp16 ZeRO-{stage} growing" for stage in range(4)] + ["fp16 ZeRO-2 growing compiled"]
OFFLOADED = ["fp32 ZeRO-1 offload", "bf16 ZeRO-2 offload", "fp32 ZeRO-3 offload", "bf16 ZeRO-3 offload"]
OFFLOADED += ["fp16 ZeRO-2 growing offload", "fp16 ZeRO-3 growing offload"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "cases", [WHOLE, GROWING, pytest.param(OFFLOADED, marks=pytest.mark.slow)], ids=["whole", "growing", "offloaded"]
)
def test_ranks_skip_a_bad_step_and_apply_whole_gradients(cases: list[str], train: Train) -> None:
    """Offloading compiles DeepSpeed's CPU Adam, which takes minutes."""
    output = completed(train(2, cases, program=[str(Path(__file__).with_name("skipping_ranks.py"))]))
    assert problems_of(output) == dict.fromkeys(cases, []), output
