"""What devices and their links can do: dense rates without sparsity, bytes a second in each direction.

GPUs by the NVIDIA A100, H100, H200 and L40S data sheets (memory, tensor-core rates, NVLink and PCIe), machines by the
NVIDIA DGX A100 and DGX H100 data sheets (network cards). CPUs by a measurement of ours, named below.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from dwt_ds.base.words import GIB
from dwt_ds.run.mfu import PEAK_TFLOPS

TFLOPS = 1e12

# Share of a link's rate that collectives reach. Assumed: about what NCCL's own tests report for such machines.
LINK_SHARE = 0.8

# Seconds that a collective takes however small it is, for each doubling of the ranks. Assumed.
LATENCY_SECONDS = 10e-6

# Share of the memory left for the CUDA context, NCCL's buffers and what the allocator cannot use. Assumed.
RESERVED_SHARE = 0.08


# Seconds of the host for an operation: Python, DeepSpeed's hooks, autograd and torch's dispatch. Measured on a core of
# an Intel Xeon at 2.5 GHz with nothing else to do, 27 November 2026: benchmarks/results/host_time.csv, which was made
# by `python benchmarks/host_time.py --steps 900`. The host of an H200 took longer: 33.1 ms for 615 launches at 16 rows
# (docs/speed.md).
LAUNCH_SECONDS = 41.5e-6

# Seconds of the host for a step, however few operations it starts: the loop's and DeepSpeed's Python. On the same
# processor, where the line through the steps of 1 and of 6 layers meets 0 operations: 8.59 ms of 127 operations, 16.38
# ms of 439 (the same file; `python benchmarks/host_time.py --steps 300 --layers 1`, and 6).
LEAST_STEP_SECONDS = 5.4e-3


@dataclass(frozen=True)
class Device:
    """One rank's device and how it reaches the others."""

    name: str
    memory_bytes: int
    tflops_16_bit: float
    """Dense bf16 or fp16, TFLOP/s."""
    tflops_fp32: float
    """fp32 as torch computes it by default: without TF32."""
    local_bytes_per_second: float
    """To the other devices of the machine, in each direction."""
    network_bytes_per_second: float
    """From the whole machine to the others, in each direction, all its cards together."""
    mfu: float
    """Share of the peak rate that training reaches, unless `--mfu` sets another."""
    launch_seconds: float = LAUNCH_SECONDS
    """Of the host, for each operation that it starts."""
    least_step_seconds: float = LEAST_STEP_SECONDS
    """Of the host, for a step."""

    @property
    def usable_bytes(self) -> int:
        """Memory that tensors may fill."""
        return int(self.memory_bytes * (1 - RESERVED_SHARE)) if not self.is_cpu else self.memory_bytes

    @property
    def is_cpu(self) -> bool:
        """Whether a rank computes on processor cores."""
        return self.name == "cpu"

    def flops_per_second(self, precision: str) -> float:
        """Peak rate in `bf16`, `fp16` or `fp32`."""
        return TFLOPS * (self.tflops_fp32 if precision == "fp32" else self.tflops_16_bit)


def _gbit(cards: int, gigabits: float) -> float:
    return cards * gigabits * 1e9 / 8


# Assumed, between two figures that others measured on an A100, both counted as 6 x parameters a token: 23% (Hugging
# Face's BERT-base at 866 rows of 128 a second) and 48% (NVIDIA's BERT-large at 580 a second).
GPU_MFU = 0.35

DEVICES = {
    "a100-40": Device("a100-40", int(39.4 * GIB), *PEAK_TFLOPS["A100"], 300e9, _gbit(8, 200), GPU_MFU),
    "a100-80": Device("a100-80", int(79.2 * GIB), *PEAK_TFLOPS["A100"], 300e9, _gbit(8, 200), GPU_MFU),
    "h100": Device("h100", int(79.1 * GIB), *PEAK_TFLOPS["H100 80GB HBM3"], 450e9, _gbit(8, 400), GPU_MFU),
    "h200": Device("h200", int(139.8 * GIB), *PEAK_TFLOPS["H200"], 450e9, _gbit(8, 400), GPU_MFU),
    "l40s": Device("l40s", int(44.5 * GIB), *PEAK_TFLOPS["L40S"], 32e9, _gbit(1, 100), GPU_MFU),
}

# bf16 rate of a core in a matrix product, and the share of it that training reached: two cores of an AMD EPYC,
# 22 November 2026, the CPU row with that share in benchmarks/results/training_speed.csv, which was made by
# `python benchmarks/training_speed.py --text wiki.txt --tokenizer vocab.txt --loop-steps 4 --steps 12`.
CPU_CORE_TFLOPS = 0.378
CPU_MFU = 0.726
# fp32's rate as a share of bf16's, bytes a second between ranks of one machine, Gbit/s between machines. Assumed.
_CPU_FP32_SHARE, _CPU_LOCAL_BYTES, _CPU_NETWORK_GBPS = 0.25, 2e9, 10

DEVICE_NAMES = (*DEVICES, "cpu")


def find_device(
    name: str,
    ranks_per_node: int,
    *,
    network_gbps: float | None = None,
    mfu: float | None = None,
    launch_us: float | None = None,
) -> Device:
    """The device called `name`.

    Args:
        name: one of DEVICE_NAMES; cpu is a rank's share of this machine's cores and memory.
        ranks_per_node: ranks that share a machine.
        network_gbps: Gbit/s from a whole machine to the others, in each direction; None: the data sheet's.
        mfu: share of the peak rate that training reaches; None: the table's.
        launch_us: microseconds of the host for an operation; None: LAUNCH_SECONDS, or 0 on a CPU.

    Raises:
        ValueError: unknown name.
    """
    if name == "cpu":
        device = _cpu(ranks_per_node)
    elif name in DEVICES:
        device = DEVICES[name]
    else:
        raise ValueError(f"--gpu {name}: unknown; use one of {', '.join(DEVICE_NAMES)}")
    if network_gbps is not None:
        device = replace(device, network_bytes_per_second=network_gbps * 1e9 / 8)
    if launch_us is not None:
        device = replace(device, launch_seconds=launch_us / 1e6)
    return device if mfu is None else replace(device, mfu=mfu)


def _cpu(ranks: int) -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tflops = CPU_CORE_TFLOPS * len(os.sched_getaffinity(0)) / ranks
    fp32 = _CPU_FP32_SHARE * tflops
    network = _gbit(1, _CPU_NETWORK_GBPS)
    return Device("cpu", memory // ranks, tflops, fp32, _CPU_LOCAL_BYTES, network, CPU_MFU, 0.0, 0.0)
