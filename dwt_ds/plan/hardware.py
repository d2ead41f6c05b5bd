"""What the devices can do, by their makers' data sheets: dense rates without sparsity, bytes each way of a link.

Sources: NVIDIA A100, H100, H200 and L40S data sheets (memory, tensor-core rates, NVLink and PCIe); NVIDIA DGX A100 and
DGX H100 data sheets (network cards a machine).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

GIB = 1 << 30
TFLOPS = 1e12

# Collectives reach about this share of a link's rate in NCCL's own tests on such machines; an assumption, not a
# measurement of ours.
LINK_SHARE = 0.8

# Time that a collective takes however small it is: so many microseconds for each doubling of the ranks.
LATENCY_SECONDS = 10e-6

# Left for the CUDA context, NCCL's buffers and what the allocator cannot use.
RESERVED_SHARE = 0.08


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
    """To the other devices of the machine, each way."""
    network_bytes_per_second: float
    """Of the whole machine to the others, each way, all its cards together."""
    mfu: float
    """Share of the rate that training is assumed to reach where nobody says otherwise."""

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


# An assumption between two measured figures: 23% (Hugging Face's BERT-base at 866 rows of 128 a second on an A100) and
# 48% (NVIDIA's BERT-large, 580 a second), both counted as 6 x parameters a token.
_MFU = 0.35

DEVICES = {
    "a100-40": Device("a100-40", int(39.4 * GIB), 312, 19.5, 300e9, _gbit(8, 200), _MFU),
    "a100-80": Device("a100-80", int(79.2 * GIB), 312, 19.5, 300e9, _gbit(8, 200), _MFU),
    "h100": Device("h100", int(79.1 * GIB), 989, 67, 450e9, _gbit(8, 400), _MFU),
    "h200": Device("h200", int(139.8 * GIB), 989, 67, 450e9, _gbit(8, 400), _MFU),
    "l40s": Device("l40s", int(44.5 * GIB), 362, 91.6, 32e9, _gbit(1, 100), _MFU),
}

# benchmarks/results/training_speed.csv: 813 GFLOP/s on two cores of an AMD EPYC, of which training reached 63%; fp32
# is a quarter of it there.
_CPU_CORE_TFLOPS = 0.41
_CPU_MFU = 0.63
DEVICE_NAMES = (*DEVICES, "cpu")


def find_device(name: str, ranks_per_node: int, network_gbps: float | None = None) -> Device:
    """The device called `name`, with another network where one is given.

    Args:
        name: one of DEVICE_NAMES; cpu stands for a rank's share of this machine's cores and memory.
        ranks_per_node: for the shares.
        network_gbps: of a whole machine, in Gbit/s each way; None: the data sheet's.

    Raises:
        ValueError: unknown name.
    """
    if name == "cpu":
        device = _cpu(ranks_per_node)
    elif name in DEVICES:
        device = DEVICES[name]
    else:
        raise ValueError(f"--gpu {name}: unknown; use one of {', '.join(DEVICE_NAMES)}")
    return device if network_gbps is None else replace(device, network_bytes_per_second=network_gbps * 1e9 / 8)


def _cpu(ranks: int) -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tflops = _CPU_CORE_TFLOPS * len(os.sched_getaffinity(0)) / ranks
    return Device("cpu", memory // ranks, tflops, tflops / 4, 2e9, _gbit(1, 10), _CPU_MFU)
