"""Without a GPU: every kernel compiles for the GPUs it is meant for, and keeps its values in registers.

A spill is a value that did not fit and goes through memory. The row kernels may spill a few bytes, nothing a thread
notices beside the kilobyte it streams; the tile kernel of the logit-free gradient holds two accumulators, its tile and
the addresses of its atomic additions, and spills on some targets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_SPILLED_BYTES = 16
MOST_SPILLED_BYTES_OF = {"tile gradient": 1024}
KERNELS = 9


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.timeout(1800)
def test_registers(target, tmp_path):
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell").exists():
        pytest.skip("this build of Triton brings no ptxas-blackwell")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.update(TRITON_CACHE_DIR=str(tmp_path), TRITON_DEFAULT_FP_FUSION="1")
    script = Path(__file__).with_name("assemble.py")
    done = subprocess.run([sys.executable, str(script), target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == KERNELS
    too_many = [
        line for line in report if line["spilled_bytes"] > MOST_SPILLED_BYTES_OF.get(line["kernel"], MOST_SPILLED_BYTES)
    ]
    assert not too_many
