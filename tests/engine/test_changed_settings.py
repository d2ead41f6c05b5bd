"""A resume under other settings of the optimizer trains with them; it continues as ever where nothing has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.rank_cases import problems_of
from harness.ranks import Train
from harness.runs import completed

CASES = [f"{precision} ZeRO-{stage}" for precision in ("fp32", "fp16") for stage in range(4)] + ["bf16 ZeRO-0"]
CASES += ["fp16 ZeRO-0 static", "fp16 ZeRO-2 static", "fp32 ZeRO-1 re-sharded", "fp16 ZeRO-2 re-sharded"]
OFFLOADED = ["fp32 ZeRO-2 offload", "bf16 ZeRO-3 offload", "fp32 ZeRO-2 later", "bf16 ZeRO-3 later"]


@pytest.mark.parametrize("cases", [CASES, pytest.param(OFFLOADED, marks=pytest.mark.slow)], ids=["whole", "offloaded"])
def test_a_resume_takes_the_settings_of_its_start(cases: list[str], train: Train, tmp_path: Path) -> None:
    """Offloading compiles DeepSpeed's CPU Adam, which takes minutes."""
    program = [str(Path(__file__).with_name("settings_ranks.py"))]
    output = completed(train(1, [str(tmp_path), *cases], program=program))
    assert problems_of(output) == dict.fromkeys(cases, []), output
