"""Runs the exactness check on the kernels as they are and on copies with one fault each; prints what it saw.

test_mutations.py starts it with TRITON_INTERPRET=1. A line is "name: exact" or "name: caught".
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent


class Mutant(NamedTuple):
    name: str
    backend: str
    file: str
    old: str
    new: str


MUTANTS = [
    Mutant("no fault", "triton", "triton_steps.py", "", ""),
    Mutant("no fault", "torch", "row_formulas.py", "", ""),
    Mutant(
        "sum not rescaled",
        "triton",
        "triton_steps.py",
        "student_sum * tl.exp2(student_shift * LOG2_E) + block_student_sum",
        "student_sum + block_student_sum",
    ),
    Mutant(
        "teacher's sum not rescaled",
        "triton",
        "triton_steps.py",
        "teacher_sum = teacher_sum * rescale + block_teacher_sum",
        "teacher_sum = teacher_sum + block_teacher_sum",
    ),
    Mutant(
        "divergence not shifted",
        "triton",
        "triton_steps.py",
        "rescale * (kl_sum + teacher_sum * (shift * KL_SCALE))",
        "rescale * kl_sum",
    ),
    Mutant(
        "tau of the soft loss is 1",
        "triton",
        "triton_steps.py",
        "exponentials if UNIT_TEMPERATURE else power(student, factor, residual, False)",
        "exponentials",
    ),
    Mutant(
        "hard loss at tau",
        "triton",
        "triton_steps.py",
        "    exponentials = tl.exp2(student * LOG2_E)",
        "    exponentials = tl.exp2(student * factor)",
    ),
    Mutant(
        "tau of the gradient is 1",
        "triton",
        "triton_steps.py",
        "student_tau_sum) * power(student, factor, residual, False)",
        "student_tau_sum) * tl.exp2(student * LOG2_E)",
    ),
    Mutant(
        "columns not masked",
        "triton",
        "triton_steps.py",
        "mask=columns < V, other=MINUS_INF",
        "mask=columns < V, other=0.0",
    ),
    Mutant(
        "label left out",
        "triton",
        "triton_steps.py",
        "gradient -= tl.where(columns == label, hard_scale, 0.0)",
        "gradient -= 0.0",
    ),
    Mutant(
        "ignored rows not masked",
        "triton",
        "triton_kernels.py",
        "if not SOFT_ALL and not labelled:\n        write_zeros(out_pointer",
        "if V < 0:\n        write_zeros(out_pointer",
    ),
    Mutant(
        "upstream gradient ignored",
        "triton",
        "triton_kernels.py",
        "row_upstream = tl.load(upstream + row_index * upstream_stride)\n    hard",
        "row_upstream = 1.0\n    hard",
    ),
    Mutant(
        "tau of the soft loss is 1",
        "torch",
        "row_formulas.py",
        "tau_sum = power(student_centred, factor, residual, exponential).sum(1)",
        "tau_sum = student_sum",
    ),
    Mutant(
        "label left out", "torch", "row_formulas.py", "gradient.scatter_add_(1, labels.unsqueeze(1), row.label)", "pass"
    ),
    Mutant(
        "weights of a wrong tau",
        "torch",
        "row_formulas.py",
        "weights = power(teacher_centred, factor,",
        "weights = power(teacher_centred, factor * 2,",
    ),
]


def exactness_check(folder: Path, backend: str) -> str:
    """ "exact" or "caught", by conftest.py's comparison, for the copy of the package in ``folder``."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("dwt_kernels", "conftest")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("conftest", HERE / "conftest.py")
        assert spec is not None
        assert spec.loader is not None
        conftest = importlib.util.module_from_spec(spec)
        sys.modules["conftest"] = conftest
        spec.loader.exec_module(conftest)
        from dwt_kernels import distill_loss

        generator = torch.Generator().manual_seed(0)
        # Logits that grow with the column: the maxima come late, in the second block of the kernel.
        slope = torch.linspace(-6, 6, 5000)
        student, teacher = (torch.randn(6, 5000, generator=generator) + slope for _ in range(2))
        labels = torch.tensor([3, -100, 4999, 4096, -100, 2500])
        keywords = {"backend": backend, "temperature": 2.0, "upstream": -3.7}
        try:
            conftest.assert_as_exact_as_torch(distill_loss, student, teacher, labels, **keywords)
        except AssertionError:
            return "caught"
        return "exact"
    finally:
        sys.path.remove(str(folder))


def main() -> None:
    package = Path(importlib.util.find_spec("dwt_kernels").origin).parent
    for number, mutant in enumerate(MUTANTS):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "dwt_kernels"
            shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
            path = copy / mutant.file
            source = path.read_text()
            assert mutant.old in source, f"{mutant.name}: {mutant.file} no longer has: {mutant.old}"
            path.write_text(source.replace(mutant.old, mutant.new) if mutant.old else source)
            # The operators of every copy need a name of their own.
            for file in copy.glob("*.py"):
                text = file.read_text().replace('"dwt_kernels::', f'"mutant{number}::')
                file.write_text(text.replace("torch.ops.dwt_kernels", f"torch.ops.mutant{number}"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                print(f"{mutant.name} ({mutant.backend}): {exactness_check(Path(folder), mutant.backend)}", flush=True)


if __name__ == "__main__":
    main()
