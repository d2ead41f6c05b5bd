"""Runs a check against the reference on the kernels as they are and on copies with one fault each; prints what it saw.

The logits form is checked as in test_exactness.py, by torch's own error; the linear form by a tolerance.
test_mutations.py starts it with TRITON_INTERPRET=1. A line is "name: exact" or "name: caught".
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

HERE = Path(__file__).parent


class Mutant(NamedTuple):
    """``old`` in ``file`` becomes ``new``. ``memory``: the linear form in that mode is checked; None: logits."""

    name: str
    backend: str
    file: str
    old: str
    new: str
    memory: str | None = None


MUTANTS = [
    Mutant("no fault", "triton", "on_triton/steps.py", "", ""),
    Mutant("no fault", "torch", "on_torch/formulas.py", "", ""),
    Mutant("no fault", "triton", "on_triton/steps.py", "", "", "chunked"),
    Mutant("no fault", "triton", "on_triton/steps.py", "", "", "logit_free"),
    Mutant("no fault", "torch", "on_torch/formulas.py", "", "", "chunked"),
    Mutant(
        "sum not rescaled",
        "triton",
        "on_triton/steps.py",
        "student_sum * tl.exp2(student_shift * LOG2_E) + lane_sums(exponentials)",
        "student_sum + lane_sums(exponentials)",
    ),
    Mutant(
        "teacher's sum not rescaled",
        "triton",
        "on_triton/steps.py",
        "teacher_sum = teacher_sum * rescale + lane_sums(weights)",
        "teacher_sum = teacher_sum + lane_sums(weights)",
    ),
    Mutant(
        "divergence not shifted",
        "triton",
        "on_triton/steps.py",
        "rescaled(kl_sum + teacher_sum * (shift * KL_SCALE), rescale) + lane_sums(shares)",
        "rescaled(kl_sum, rescale) + lane_sums(shares)",
    ),
    Mutant(
        "lanes' sums not rescaled",
        "triton",
        "on_triton/steps.py",
        "tl.sum(student_sum * tl.exp2(student_shift * LOG2_E), 0)",
        "tl.sum(student_sum, 0)",
    ),
    Mutant(
        "lanes' divergences not shifted",
        "triton",
        "on_triton/steps.py",
        "tl.sum(rescaled(kl_sum + teacher_sum * (shift * KL_SCALE), rescale), 0)",
        "tl.sum(rescaled(kl_sum, rescale), 0)",
    ),
    Mutant(
        "tau of the soft loss is 1",
        "triton",
        "on_triton/steps.py",
        "exponentials if UNIT_TEMPERATURE else power(student, factor, residual, False)",
        "exponentials",
    ),
    Mutant(
        "hard loss at tau",
        "triton",
        "on_triton/steps.py",
        "    exponentials = tl.exp2(student * LOG2_E)",
        "    exponentials = tl.exp2(student * factor)",
    ),
    Mutant(
        "tau of the gradient is 1",
        "triton",
        "on_triton/steps.py",
        "gradient = student_soft * power(student, factor, residual, False)",
        "gradient = student_soft * tl.exp2(student * LOG2_E)",
    ),
    Mutant(
        "columns not masked",
        "triton",
        "on_triton/steps.py",
        "tl.load(pointers, mask=mask, other=MINUS_INF)",
        "tl.load(pointers, mask=mask, other=0.0)",
    ),
    Mutant(
        "label left out",
        "triton",
        "on_triton/steps.py",
        "return gradient - tl.where(at_label, label_share, 0.0)",
        "return gradient",
    ),
    Mutant(
        "ignored rows not masked",
        "triton",
        "on_triton/row_kernels.py",
        "if not SOFT_ALL and label == ignore_index:",
        "if V < 0:",
    ),
    Mutant(
        "upstream gradient ignored",
        "triton",
        "on_triton/scalar_kernels.py",
        "row_upstream * tl.load(scalars + HARD_GRADIENT)",
        "tl.load(scalars + HARD_GRADIENT)",
    ),
    Mutant(
        "tau of the soft loss is 1",
        "torch",
        "on_torch/formulas.py",
        "student_tau_sum = power(student_centred, exponent, exponential).sum(1)",
        "student_tau_sum = student_sum",
    ),
    Mutant(
        "label left out",
        "torch",
        "on_torch/formulas.py",
        "gradient.scatter_add_(1, labels.unsqueeze(1), row.label)",
        "pass",
    ),
    Mutant(
        "weights of a wrong tau",
        "torch",
        "on_torch/formulas.py",
        "weights = power(teacher_centred, exponent,",
        "weights = power(teacher_centred, exponent._replace(factor=2 * exponent.factor),",
    ),
    Mutant(
        "soft gradient not divided by tau",
        "triton",
        "on_triton/scalar_kernels.py",
        "tl.store(scalars + SOFT_GRADIENT, soft_loss / tau)",
        "tl.store(scalars + SOFT_GRADIENT, soft_loss)",
    ),
    Mutant(
        "the mean divides by every row",
        "triton",
        "on_triton/scalar_kernels.py",
        "hard_divisor = labelled_rows.to(tl.float64)",
        "hard_divisor = rows.to(tl.float64)",
    ),
    Mutant(
        "upstream gradient in place ignored",
        "triton",
        "on_triton/row_kernels.py",
        "row_upstream = tl.load(upstream + row_index * upstream_stride)",
        "row_upstream = 1.0",
        "chunked",
    ),
    Mutant(
        "last column in place left out",
        "triton",
        "on_triton/row_kernels.py",
        "terms, factor, residual, rest, mask)",
        "terms, factor, residual, rest, mask & (rest < V - 1))",
        "chunked",
    ),
    Mutant(
        "the columns before the first whole block are left out",
        "triton",
        "on_triton/steps.py",
        "places < FIRST + V",
        "places < head + V",
    ),
    Mutant(
        "rows that begin within a load are not shifted",
        "triton",
        "on_triton/row_kernels.py",
        "elif whole:\n        write_gradient_block(out_pointer, 1, row, label + head,",
        "elif whole:\n        write_gradient_block(out_pointer, 1, row, label,",
    ),
    Mutant(
        "gradient in place without the bias",
        "triton",
        "on_triton/row_kernels.py",
        "write_gradient_block(row[0], row[2], row, label,",
        "write_gradient_block(row[0], row[2], (row[0], None, row[2], row[3], row[4], row[5]), label,",
        "chunked",
    ),
    Mutant(
        "dW of the last chunk only",
        "triton",
        "linear_chunked.py",
        "else total.addmm_(left, right)",
        "else torch.mm(left, right)",
        "chunked",
    ),
    Mutant(
        "waiting gradients meet no upstream gradient",
        "triton",
        "on_triton/scalar_kernels.py",
        ".to(tl.float32) * tl.load(factor)",
        ".to(tl.float32)",
        "chunked",
    ),
    Mutant(
        "waiting gradients meet no upstream gradient",
        "torch",
        "on_torch/blocks.py",
        "return torch.mul(tensor, factor, out=out)",
        "return out.copy_(tensor)",
        "chunked",
    ),
    Mutant(
        "shares of the columns not rescaled",
        "triton",
        "on_triton/steps.py",
        "tl.sum(student_sum * tl.exp2(student_shift * LOG2_E), 0)",
        "tl.sum(student_sum, 0)",
        "logit_free",
    ),
    Mutant(
        "tiles' columns not masked",
        "triton",
        "on_triton/tile_statistics.py",
        "return tl.where(column_index[None, :] < V, logits, MINUS_INF)",
        "return logits",
        "logit_free",
    ),
    Mutant(
        "tiles' gradient at tau 1",
        "triton",
        "on_triton/steps.py",
        "gradient = student_soft * power(student, factor, residual, False)",
        "gradient = student_soft * tl.exp2(student * LOG2_E)",
        "logit_free",
    ),
    Mutant(
        "a tile's sum not rescaled",
        "triton",
        "on_triton/steps.py",
        "student_sum * tl.exp2(student_shift * LOG2_E) + lane_sums(exponentials)",
        "student_sum + lane_sums(exponentials)",
        "logit_free",
    ),
    Mutant(
        "a tile's divergence not shifted",
        "triton",
        "on_triton/steps.py",
        "rescaled(kl_sum + teacher_sum * (shift * KL_SCALE), rescale) + lane_sums(shares)",
        "rescaled(kl_sum, rescale) + lane_sums(shares)",
        "logit_free",
    ),
]


def load(name: str) -> ModuleType:
    """A file of this folder as a module, importing whatever package is first on the path now."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check_logits_form(backend: str) -> None:
    from dwt_kernels import distill_loss

    generator = torch.Generator().manual_seed(0)
    # Logits that grow with the column: the maxima come late, in the second block of the kernel. As their number is odd,
    # rows begin at any distance from a multiple of 16 bytes.
    slope = torch.linspace(-6, 6, 5001)
    student, teacher = (torch.randn(6, 5001, generator=generator) + slope for _ in range(2))
    labels = torch.tensor([3, -100, 5000, 4096, -100, 2500])
    keywords = {"backend": backend, "temperature": 2.0, "upstream": -3.7}
    load("conftest").assert_as_exact_as_torch(distill_loss, student, teacher, labels, **keywords)


def check_linear_form(backend: str, memory: str) -> None:
    """Losses and the three gradients, in two chunks or three shares of the columns, of one and two tiles."""
    from dwt_kernels import linear_distill_loss

    linear = load("linear_cases")
    generator = torch.Generator().manual_seed(0)
    slope = torch.linspace(-6, 6, 601)
    heads = []
    for width in (8, 6):
        hidden, weight = torch.randn(6, width, generator=generator), torch.randn(601, width, generator=generator)
        heads.append([hidden, weight / width**0.5, slope.clone()])
    inputs = linear.Heads(*heads, torch.tensor([3, -100, 600, 128, 40, 250]))
    mode = {"backend": backend, "memory": memory, "chunk_rows": 3}
    for reduction in ("mean", "none"):
        keywords = {"temperature": 2.0, "reduction": reduction}
        found = linear.with_gradients(linear_distill_loss, inputs, -3.7, None, **keywords, **mode)
        exact = linear.with_gradients(linear.reference, inputs, -3.7, torch.float64, **keywords)
        for ours, theirs in zip(found, exact):
            torch.testing.assert_close([each.double() for each in ours], theirs, rtol=1e-4, atol=1e-5)


def check(folder: Path, mutant: Mutant) -> str:
    """ "exact" or "caught", for the copy of the package in ``folder``."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("dwt_kernels", "conftest", "linear_cases")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        if mutant.memory is None:
            check_logits_form(mutant.backend)
        else:
            check_linear_form(mutant.backend, mutant.memory)
        return "exact"
    except AssertionError:
        return "caught"
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
                checked = f"{mutant.backend}, {mutant.memory or 'logits'}"
                print(f"{mutant.name} ({checked}): {check(Path(folder), mutant)}", flush=True)


if __name__ == "__main__":
    main()
