"""The one place that starts Triton kernels, so that each runs on its tensors' GPU."""

from __future__ import annotations

from typing import Any

import torch


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[programs](*arguments, **constants)`` on the GPU of the first argument, a tensor; on a CPU as it is.

    Triton starts a kernel on the current device, which need not be that of the tensors: they may be on cuda:1 while
    cuda:0 is current. To change it is no synchronisation, and allowed while a CUDA graph is captured.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[programs](*arguments, **constants)
