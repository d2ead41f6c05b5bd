"""The gradient in one pass over memory, by torch.compile, where that pays on a CPU.

Only the gradient: it is elementwise, and fused about twice as fast as its operations one by one. The losses are sums
over the vocabulary; fused they gained little and lost digits (the generated code adds 1,900 terms in a row).
"""

from __future__ import annotations

import logging
import os
import shutil
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dwt_kernels.layout import Logits
from dwt_kernels.on_torch.formulas import Exponent, block_gradient

# Rows x columns of one call from which compilation is repaid: it takes 5 to 20 s once in a process and saves about
# 0.9 ns of a core for each element, here 15 ms a call, so within about a thousand training steps.
FUSION_ELEMENTS = 1 << 24

# Elements of one call of the fused code. Large, so that there are few calls. Bounded, because its result is copied once
# and because after too many recompilations torch runs the plain operations instead, which need temporaries.
BLOCK_ELEMENTS = 1 << 20

logger = logging.getLogger(__name__)
_broken = False


def pays(student: Tensor) -> bool:
    """Whether this call is large enough and a C++ compiler is there. Depends on the shape alone, never on history.

    TORCHDYNAMO_DISABLE=1 in the environment turns fusion off, as it does torch.compile everywhere.
    """
    large = student.device.type == "cpu" and student.numel() >= FUSION_ELEMENTS and student.stride(1) == 1
    return large and has_compiler() and not _broken


@cache
def has_compiler() -> bool:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return any(shutil.which(name.split()[0]) is not None for name in names if name)


def write_gradient(
    logits: Logits, labels: Tensor, statistics: Tensor, factors: Tensor, exponent: Exponent, out: Tensor
) -> None:
    """Write ``block_gradient`` into ``out`` (N, V), which may be the student's.

    If the compiler fails, plain operations make this block and the rest: the blocks before it may have overwritten
    their logits already.

    ``labels`` (N,) are columns. Their gradients are computed separately in fp32 and stored last, because ``out`` may be
    rounded to 16 bits. A row may hold NaN or infinity, and then its gradient does too; other rows are not affected.
    """
    global _broken
    columns = labels.unsqueeze(1)
    # As a number it would be compiled into the code, once for each temperature.
    exponent = exponent._replace(residual=exponent.factor.new_tensor(exponent.residual))
    at_label = block_gradient(
        [factors.new_empty(columns.shape) for _ in range(3)],
        Logits(
            logits.student.gather(1, columns),
            None if logits.teacher is None else logits.teacher.gather(1, columns),
            None if logits.student_bias is None else logits.student_bias[columns],
            None if logits.teacher_bias is None else logits.teacher_bias[columns],
        ),
        torch.zeros_like(labels),
        statistics,
        factors,
        exponent,
    )
    compute = fused_gradient()
    count = -(-logits.student.numel() // BLOCK_ELEMENTS)
    split = [
        [None] * count if each is None else each.tensor_split(count)
        for each in (logits.student, logits.teacher, statistics, factors)
    ]
    for out_block, *block in zip(out.tensor_split(count), *split):
        for tensor in block:
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        student, teacher, *rows = block
        inputs = (logits._replace(student=student, teacher=teacher), *rows, exponent)
        try:
            gradient = compute(out.dtype, *inputs)
        except Exception as error:  # whatever fails in the compiler, plain operations give the same result
            _broken, compute = True, _rounded_gradient
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            logger.warning("fusing the loss gradient failed, using plain operations: %s", reason)
            gradient = compute(out.dtype, *inputs)
        out_block.copy_(gradient)
    # Not scatter_, which copies all of ``out`` on a CPU.
    out[torch.arange(out.shape[0]), labels] = at_label.squeeze(1).to(out.dtype)


@cache
def fused_gradient() -> Any:
    """``_rounded_gradient`` compiled.

    It returns its result because it must not write to a view of a tensor that it reads: of such views torch.compile's
    code takes the first call's offsets for all, and in place every block would land in the first.
    """
    return torch.compile(_rounded_gradient)


def _rounded_gradient(
    dtype: torch.dtype, logits: Logits, statistics: Tensor, factors: Tensor, exponent: Exponent
) -> Tensor:
    buffers = [torch.empty(logits.student.shape, dtype=torch.float32) for _ in range(3)]  # the compiler elides them
    return block_gradient(buffers, logits, None, statistics, factors, exponent).to(dtype)
