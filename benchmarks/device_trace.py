"""What a profiler's trace says about the work of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What the host calls to start work on the device, as torch's profiler names it.
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def device_work(trace: Sequence[dict[str, Any]], steps: int, seconds_per_step: float) -> dict[str, Any]:
    """Launches and kernels a step, and the share of `seconds_per_step` in which the device computes or copies.

    Args:
        trace: events of `steps` profiled steps in Chrome's format, with times in microseconds.
        seconds_per_step: without the profiler, which slows the host and not the device.
    """
    calls = [event["name"] for event in trace if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = sum(name.startswith(_LAUNCHES) for name in calls)
    work = sorted((event["ts"], event["ts"] + event["dur"]) for event in trace if event.get("cat") in _ON_DEVICE)
    busy, until = 0.0, 0.0
    for begin, end in work:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    if not work:
        return {}
    return {
        "launches_per_step": round(launches / steps),
        "device_operations_per_step": round(len(work) / steps),
        "device_busy_share": round(busy / 1e6 / steps / seconds_per_step, 3),
    }
