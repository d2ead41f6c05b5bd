"""The Triton kernels on a machine without a GPU: other files' tests in Triton's interpreter, in processes of its own.

TRITON_INTERPRET has to be set before Triton is first imported, and this process has imported it without.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Every kernel, on few shapes: one and two blocks of columns, ignored rows, no teacher, infinities.
FEW_SHAPES = [
    "test_exactness.py::test_sizes_and_dtypes[triton-5000-torch.bfloat16]",
    "test_exactness.py::test_temperatures[triton-torch.float32-0.5-5000]",
    "test_exactness.py::test_hard_only",
    "test_exactness.py::test_rows_that_begin_anywhere[triton-torch.bfloat16-4098]",
    "test_exactness.py::test_no_row_counts[triton-mean]",
    "test_in_place.py::test_against_reference[triton-two blocks-torch.bfloat16-torch.float32-2.5-all]",
    "test_in_place.py::test_against_reference[triton-one block-torch.float16-torch.float16-1.0-labelled]",
    "test_extreme_values.py::test_large_logits[triton-2.0-10000.0]",
    "test_extreme_values.py::test_both_minus_infinity",
    "test_linear.py::test_against_reference[triton-chunked-torch.bfloat16-mean]",
    "test_linear.py::test_against_reference[triton-logit_free-torch.float32-none]",
    "test_linear_rules.py::test_rows_that_do_not_count_may_hold_anything[triton-logit_free-mean]",
    "test_linear_chunked.py::test_nothing_is_read_before_it_is_written[triton-torch.bfloat16]",
    "test_linear.py::test_hard_only",
    "test_on_triton.py",
]

# Everything. A process a list: importing takes some seconds.
ALL_SHAPES = [
    ["test_exactness.py"],
    ["test_extreme_values.py", "test_published_values.py"],
    ["test_linear.py", "test_linear_rules.py", "test_linear_chunked.py", "test_in_place.py", "test_on_triton.py"],
    ["test_large.py", "test_compiled.py::test_changing_number_of_rows"],
]

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="the same tests run the compiled kernels on this machine's GPU"
    ),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already in the interpreter"),
    pytest.mark.timeout(1800),
]


def test_few_shapes():
    run_in_interpreter(FEW_SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("tests", ALL_SHAPES, ids=" ".join)
def test_all_shapes(tests):
    run_in_interpreter(tests)


def run_in_interpreter(tests: list[str]) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parent
    done = subprocess.run(
        [*command, "-m", "not slow", *(str(folder / test) for test in tests)],
        env=environment,
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
