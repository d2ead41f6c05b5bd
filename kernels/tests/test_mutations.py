"""The comparisons with the reference are themselves checked: kernels with one fault each must fail them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import dwt_kernels
import pytest
import torch

SCRIPT = Path(__file__).with_name("mutants.py")


def test_the_source_still_has_what_each_fault_replaces():
    package = Path(dwt_kernels.__file__).parent
    mutants = runpy.run_path(str(SCRIPT))["MUTANTS"]
    gone = [mutant.name for mutant in mutants if mutant.old not in (package / mutant.file).read_text()]
    assert not gone


@pytest.mark.skipif(torch.cuda.is_available(), reason="the faulty kernels run in the interpreter, on CPU tensors")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="starts the interpreter itself")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_fault_is_caught():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    sound = {name: result for name, result in results.items() if name.startswith("no fault")}
    faulty = {name: result for name, result in results.items() if name not in sound}
    assert len(sound) == 5
    assert set(sound.values()) == {"exact"}, sound
    assert len(faulty) == 30
    assert set(faulty.values()) == {"caught"}, faulty
