"""Checks of the public functions' arguments: one line that names the argument, its value and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from numbers import Real
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | int | Tensor
Normalizer = Scalar | tuple[Scalar, Scalar] | None

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "triton", "torch")
SOFT_POSITIONS = ("labelled", "all")


class Objective(NamedTuple):
    """The keywords shared by both public functions, checked. Scalars are 0-d tensors on the inputs' device.

    Its fields, in this order, are the last arguments of the custom operators (OBJECTIVE_SCHEMA).
    """

    temperature: Tensor
    hard_weight: Tensor
    soft_weight: Tensor
    hard_normalizer: Tensor | None
    soft_normalizer: Tensor | None
    ignore_index: int
    soft_all: bool
    temperature_squared: bool
    reduction: str
    backend: str


OBJECTIVE_SCHEMA = (
    "Tensor temperature, Tensor hard_weight, Tensor soft_weight, Tensor? hard_normalizer, Tensor? soft_normalizer, "
    "int ignore_index, bool soft_all, bool temperature_squared, str reduction, str backend"
)


def resolve_objective(
    device: torch.device,
    *,
    temperature: Scalar,
    hard_weight: Scalar,
    soft_weight: Scalar,
    ignore_index: int,
    soft_positions: str,
    temperature_squared: bool,
    normalizer: Normalizer,
    reduction: str,
    backend: str,
) -> Objective:
    """Check the keywords and bring every number onto ``device`` without a host synchronisation."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("soft_positions", soft_positions, SOFT_POSITIONS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index must be an int, got {ignore_index!r}")
    if isinstance(temperature, Real) and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    normalizers = normalizer if isinstance(normalizer, (tuple, list)) else (normalizer, normalizer)
    if len(normalizers) != 2:
        raise ValueError(f"normalizer must be one value or a pair (hard, soft), got {len(normalizers)} values")
    hard_normalizer, soft_normalizer = normalizers
    for value in (hard_normalizer, soft_normalizer):
        if isinstance(value, Real) and not 0 < value < float("inf"):
            raise ValueError(f"normalizer must be positive and finite, got {value}")
    return Objective(
        temperature=scalar_tensor("temperature", temperature, device),
        hard_weight=scalar_tensor("hard_weight", hard_weight, device),
        soft_weight=scalar_tensor("soft_weight", soft_weight, device),
        hard_normalizer=None if hard_normalizer is None else scalar_tensor("normalizer", hard_normalizer, device),
        soft_normalizer=None if soft_normalizer is None else scalar_tensor("normalizer", soft_normalizer, device),
        ignore_index=ignore_index,
        soft_all=soft_positions == "all",
        temperature_squared=bool(temperature_squared),
        reduction=reduction,
        backend=resolve_backend(backend, device),
    )


def resolve_backend(backend: str, device: torch.device) -> str:
    """``"auto"`` means Triton on a GPU and plain torch elsewhere."""
    check_choice("backend", backend, BACKENDS)
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    try:
        from dwt_kernels.on_triton.constants import INTERPRETED
    except ImportError:
        if backend == "auto":
            return "torch"
        raise ValueError('backend="triton" needs the triton package; install it or use backend="torch"') from None
    if device.type != "cuda" and not INTERPRETED.value:
        raise ValueError(
            f'backend="triton" needs a GPU, got tensors on {device}; use backend="torch" '
            "(or, for tests only, set TRITON_INTERPRET=1 before the first import)"
        )
    return "triton"


@cache
def backend_module(backend: str) -> ModuleType:
    """The package that computes the rows: "torch" or "triton", as ``resolve_backend`` returns it."""
    return import_module(f"dwt_kernels.on_{backend}")


def scalar_tensor(name: str, value: Scalar, device: torch.device) -> Tensor:
    """A number as 0-d fp64 (0.7 in fp32 is off by 2e-8, in every row alike), a 0-d tensor as fp32 or fp64."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(
                f"{name} is on {value.device} and the inputs on {device}; move it with .to({str(device)!r})"
            )
        if value.requires_grad:
            raise ValueError(f"{name} requires grad, but no gradient reaches it; pass {name}.detach()")
        return value if value.dtype == torch.float64 else value.to(torch.float32)
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's numbers are Real too
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {type(value).__name__}")
    return torch.full((), float(value), dtype=torch.float64, device=device)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_float_tensor(name: str, tensor: Tensor, shape_text: str) -> None:
    """``shape_text`` is "(N, V)" or similar and gives the number of dimensions; "(V,)" has one."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {shape_text}, got {type(tensor).__name__}")
    if tensor.dim() != (1 if shape_text.endswith(",)") else 2):
        raise ValueError(f"{name} must have shape {shape_text}, got {tuple(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check_rows(name: str, tensor: Tensor, rows: int) -> None:
    if tensor.shape[0] != rows:
        raise ValueError(f"{name} has {tensor.shape[0]} rows and the student {rows}; they must be the same rows")


def check_labels(labels: Tensor, rows: int) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be an int64 tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != (rows,):
        raise ValueError(f"labels must have shape ({rows},), one per row, got {tuple(labels.shape)}")


def check_same_device(tensors: Mapping[str, Tensor | None]) -> None:
    """All on the device of the first."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} and {first_name} on {first.device}; use one device")


def check_teacher_frozen(tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but no gradient reaches the teacher; pass {name}.detach()")


def resolve_vocab_size(of: str, vocab_size: int | None, student_columns: int, teacher_columns: int | None) -> int:
    """The number of columns that carry probability. The two widths may differ only when ``vocab_size`` says so.

    ``of``: what has them, "logits" or "weight", for messages.
    """
    if vocab_size is None:
        if teacher_columns is not None and teacher_columns != student_columns:
            raise ValueError(
                f"teacher_{of} is {teacher_columns} words wide and student_{of} {student_columns}; pass vocab_size if "
                "the rest is padding"
            )
        vocab_size = student_columns
    widest = student_columns if teacher_columns is None else min(student_columns, teacher_columns)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= widest:
        raise ValueError(f"vocab_size must be an int between 1 and {widest}, got {vocab_size!r}")
    return vocab_size


def check_values(labels: Tensor, vocab_size: int, objective: Objective) -> None:
    """Checks that read values: raised on a CPU, asserted on the device (no host synchronisation) on a GPU."""
    ignore_index, temperature = objective.ignore_index, objective.temperature
    checks = [
        (
            ((labels == ignore_index) | ((labels >= 0) & (labels < vocab_size))).all(),
            f"labels must be ignore_index ({ignore_index}) or between 0 and vocab_size - 1 ({vocab_size - 1})",
        ),
        ((temperature > 0) & (temperature < float("inf")), "temperature must be positive and finite"),
    ]
    checks += [
        ((value >= 0) & (value < float("inf")), "normalizer must not be negative or infinite")
        for value in (objective.hard_normalizer, objective.soft_normalizer)
        if value is not None
    ]
    for condition, message in checks:
        if condition.device.type != "cpu":
            torch._assert_async(condition, message)
        elif not condition.item():
            raise ValueError(message)
