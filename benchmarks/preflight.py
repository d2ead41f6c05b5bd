"""Whether a GPU round is worth its minutes: kernels against the formula, what the chunked form needs, which Adam runs.

    python benchmarks/preflight.py [--out DIR] [--adam-seconds 12]

Exit code 3 if the loss kernels are wrong or do not run: then no other figure means anything. Results: a row for each
check in DIR/preflight.csv. DeepSpeed's Adam is compiled by nvcc at its first use, for longer than a round waits. The
build goes on after this ends, and a run that needs it waits for it.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rows import RESULTS, Row, processor_and_cores, write_rows

from dwt_ds.doctor.kernel_check import check_kernels

KERNELS_ARE_WRONG = 3
ADAM = """
import torch
from dwt_ds.engine.optimizers import unusable_reason
reason = unusable_reason("deepspeed.FusedAdam", torch.device("cuda"))
print(f"torch's fused Adam; DeepSpeed's: {reason}" if reason else "DeepSpeed's FusedAdam")
"""


def main() -> int:
    """Prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    parser.add_argument("--adam-seconds", type=float, default=12, help="how long to wait for DeepSpeed's Adam")
    options = parser.parse_args()
    adam = None
    if torch.cuda.is_available():
        # In a session of its own: killed with this process, a build would leave its lock for all who need it later.
        adam = subprocess.Popen([sys.executable, "-c", ADAM], stdout=subprocess.PIPE, text=True, start_new_session=True)
    rows: list[Row] = []
    kernels_are_right = True

    def add(row: Row) -> None:
        """Written at once, since a round may cut the rest short."""
        rows.append(row)
        print(f"{'ok    ' if row['ok'] else 'FAILED'} {row['check']}: {row['found']}", flush=True)
        write_rows(options.out / "preflight.csv", rows)

    add(_row("machine", True, _machine()))
    for answer in check_kernels():
        add(_kernels(answer))
        kernels_are_right &= not answer["problem"]
    if not kernels_are_right:
        return KERNELS_ARE_WRONG
    add(_addmm())
    add(_adam(adam, options.adam_seconds))
    return 0


def _row(check: str, ok: bool, found: str) -> Row:
    return {"check": check, "ok": ok, "found": found}


def _machine() -> str:
    device = "no GPU"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    names = ("torch", "deepspeed", "transformers", "triton", "liger-kernel")
    packages = [f"{name} {version(name)}" for name in names if find_spec(name.replace("-", "_"))]
    return f"{device}; {processor_and_cores()}; python {platform.python_version()}, {', '.join(packages)}"


def _kernels(answer: dict[str, Any]) -> Row:
    errors = ", ".join(f"{dtype} off by {error:.1e}" for dtype, error in answer["errors"].items())
    check = f"kernels on {answer['device']}, back end {answer['backend']}"
    return _row(check, not answer["problem"], answer["problem"] or errors)


def _addmm() -> Row:
    """bf16 products that add up in fp32, which the linear form's gradient of the weights uses on a GPU."""
    check = "bf16 addmm with out_dtype=float32"
    if not torch.cuda.is_available():
        return _row(check, True, "not checked: needs a GPU")
    left, right = (torch.randn(256, 256, device="cuda").bfloat16() for _ in range(2))
    total = torch.randn(256, 256, device="cuda")
    exact = total.double() + left.double() @ right.double()
    try:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    except Exception as error:  # which error an older torch or another device raises is what is asked
        return _row(check, False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    off = ((total.double() - exact).abs().max() / exact.abs().max()).item()
    return _row(check, off < 1e-4, f"off by {off:.1e} of the largest value")


def _adam(process: subprocess.Popen[str] | None, seconds: float) -> Row:
    check = "Adam"
    if process is None:
        return _row(check, True, "torch's fused Adam, as always without a GPU")
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return _row(check, True, f"DeepSpeed's is still being built after {seconds:.0f} s")
    lines = said.strip().splitlines()
    return _row(check, process.returncode == 0, lines[-1] if lines else f"exit code {process.returncode}")


if __name__ == "__main__":
    sys.exit(main())
