"""The Triton kernels on a machine without a GPU: the same tests in Triton's interpreter, in a process of its own.

TRITON_INTERPRET has to be set before Triton is first imported, and this process has imported it without.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# What one process runs: importing takes it some seconds.
RUNS = [
    ["test_exactness.py"],
    ["test_extreme_values.py", "test_published_values.py"],
    ["test_linear.py", "test_linear_chunked.py", "test_on_triton.py"],
    ["test_large.py", "test_compiled.py::test_changing_number_of_rows"],
]

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="the same tests run the compiled kernels on this machine's GPU"
    ),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already in the interpreter"),
    pytest.mark.timeout(1800),
]


@pytest.mark.parametrize("files", RUNS, ids=" ".join)
def test_in_interpreter(files):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parent
    done = subprocess.run(
        [*command, "-m", "not slow", *(str(folder / file) for file in files)],
        env=environment,
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
