"""Without a GPU: every kernel compiles for the GPUs it is meant for, keeps its values in registers, and fits.

A spill is a value that did not fit and goes through memory. The row kernels may spill a few bytes, nothing a thread
notices beside the kilobyte it streams; the tile kernels hold two accumulators, that of the gradient also its tile and
the addresses of its atomic additions, and spill on some targets. Shared memory is only checked at a launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_SPILLED_BYTES = 32
# Loads and stores of 16 bytes where a thread has 8 columns of two matrices in 16 bits (gradient; zeros are stored
# apart), 16 in two loops (statistics: at tau = 1, at another), with biases in three (in place: these and the gradient),
# or 16 elements of one (scale). In fp32 these are twice as many.
WIDE = {
    "statistics": {"load 128": 8},
    "statistics, fp32": {"load 128": 16},
    "gradient": {"load 128": 2, "store 128": 2},
    "gradient, fp32": {"load 128": 4, "store 128": 4},
    "in place": {"load 128": 24},
    "in place, fp32": {"load 128": 48},
    "scale": {"load 128": 2, "store 128": 2},
}
MOST_SPILLED_BYTES_OF = {"tile gradient": 1024, "tile statistics": 128}
# What a program may have of a multiprocessor's.
SHARED_BYTES = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# Cases compiled, and loops in the passes over a row; AMD's assembly is not searched for them.
COUNTS = {"sm_80": (31, 19), "sm_89": (6, 0), "sm_90": (31, 19), "sm_100": (31, 19), "gfx942": (31, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_BYTES)
@pytest.mark.timeout(1800)
def test_every_kernel_and_variant(target: str, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell").exists():
        pytest.skip("this build of Triton brings no ptxas-blackwell")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.update(TRITON_CACHE_DIR=str(tmp_path), TRITON_DEFAULT_FP_FUSION="1")
    script = Path(__file__).with_name("assemble.py")
    done = subprocess.run([sys.executable, str(script), target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    spilling = [line for line in report if line["spilled_bytes"] > most_spilled_bytes(line["case"])]
    assert not spilling
    assert not [line for line in report if line["shared_bytes"] > SHARED_BYTES[target]]
    if target.startswith("sm") and target != "sm_89":
        found = {line["case"]: line["accesses"] for line in report}
        assert all(found[case].items() >= expected.items() for case, expected in WIDE.items()), found
    # The passes over a row: a thread that met others in every block would wait for memory with them.
    passes = [line for line in report if line["case"].startswith(("statistics", "in place"))]
    streaming = [loop for line in passes for loop in line["loops"]]
    assert (len(report), len(streaming)) == COUNTS[target]
    assert not [loop for loop in streaming if loop["waiting"]]


def most_spilled_bytes(case: str) -> int:
    kernel = case.partition(",")[0]
    return MOST_SPILLED_BYTES_OF.get(kernel, MOST_SPILLED_BYTES)
