"""Programs whose ranks try one case after another, and the tests that start them."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from deepspeed.accelerator import get_accelerator

from dwt_ds.engine import ranks
from dwt_ds.engine.student import quieten_deepspeed


def try_cases(cases: Iterable[str], run: Callable[[str], object]) -> None:
    """Start the ranks and `run` each case; rank 0 prints a JSON list of its name and the ranks' tracebacks."""
    quieten_deepspeed()
    ranks.start_ranks(120)
    type(get_accelerator()).is_fp16_supported = lambda self: True  # slow on most CPUs, and enough for these
    for case in cases:
        try:
            run(case)
            problem = ""
        except Exception:
            problem = traceback.format_exc()
            # Now, since the others may never come to hear of it.
            print(f"rank {ranks.rank()}, {case}: {problem}", file=sys.stderr, flush=True)
        problems = [each for each in ranks.gather_from_ranks(problem) if each]
        if ranks.rank() == 0:
            print(f"\n{json.dumps([case, problems])}", flush=True)
    ranks.stop_ranks()


def problems_of(output: str) -> dict[str, list[str]]:
    """Case -> tracebacks, from what `try_cases` printed."""
    return dict(json.loads(line) for line in output.splitlines() if line.startswith('["'))


def zero_of(stage: str, further: list[str]) -> dict[str, Any]:
    """DeepSpeed's section for a case such as `bf16 ZeRO-2 offload`; its own buckets take 2 GB a rank."""
    zero: dict[str, Any] = {"stage": int(stage.removeprefix("ZeRO-")), "stage3_param_persistence_threshold": 0}
    zero["reduce_bucket_size"] = 100_000
    return {**zero, "offload_optimizer": {"device": "cpu"}} if "offload" in further else zero
