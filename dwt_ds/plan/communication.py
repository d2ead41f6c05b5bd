"""What the ranks send each other in an optimizer step, and how long that takes.

Bytes are those of the tensors handed to the collectives. On the wire a ring all-reduce of n bytes over N ranks sends
2 (N - 1) / N x n a rank, an all-gather or reduce-scatter half of that (Patarasuk and Yuan 2009; Rajbhandari et al.
2020, section 7, counts ZeRO's traffic the same way).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dwt_ds.plan.hardware import LATENCY_SECONDS, LINK_SHARE, Device
from dwt_ds.plan.zero import STAGE_0_BUCKET, Partition, ZeroSettings

# Passes of a ring over its data: what a rank sends, as a multiple of (N - 1) / N x bytes.
_PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1}

# Of our own: labelled tokens, soft rows, real tokens and requests to stop, summed over all ranks before each step.
COUNTS_BYTES = 4 * 8

# DeepSpeed's, by stage: the gradient's norm and whether it is finite (in 16 bits only where these are two calls).
CHECKS_BYTES = {0: [], 1: [4, 1], 2: [4, 1], 3: [8]}


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one optimizer step."""

    collective: str
    what: str
    bytes: int
    """Of the tensors, over the whole step."""
    calls: int
    hidden: bool = False
    """It runs beside the backward pass (overlap_comm)."""
    local: bool = False
    """It stays within a machine (hpZ)."""

    def sent_bytes(self, ranks: int) -> float:
        """Bytes that each rank sends."""
        return _PASSES[self.collective] * (ranks - 1) / ranks * self.bytes

    def seconds(self, ranks: int, bytes_per_second: float) -> float:
        """Time on links of this rate."""
        if ranks == 1:
            return 0.0
        latency = self.calls * LATENCY_SECONDS * math.ceil(math.log2(ranks))
        return self.sent_bytes(ranks) / bytes_per_second + latency


def step_traffic(stage: int, zero: ZeroSettings, partition: Partition, accumulation: int) -> list[Traffic]:
    """The collectives of one optimizer step at a ZeRO stage; none for a single rank.

    ZeRO-2 reduces in every micro-batch, since a rank keeps its own part only; the stages below it once a step.
    """
    if partition.ranks == 1:
        return []
    size, elements = zero.element_bytes, partition.elements
    if stage == 0:
        calls = _full_buckets(partition.numels, STAGE_0_BUCKET)
        return [Traffic("all_reduce", "gradients", size * elements, calls), _small(stage, zero)]
    if stage == 3:
        return [*_stage_3(zero, partition, accumulation), _small(stage, zero)]
    times = accumulation if stage == 2 else 1
    calls = _filled_buckets(partition.numels, zero.reduce_bucket)
    hidden = zero.overlap_comm and calls > 1
    kind = "all_reduce"
    if not zero.multi_rank_all_reduce:
        kind, calls = "reduce", _reduces(partition, zero.reduce_bucket)
    return [
        Traffic(kind, "gradients", size * elements * times, calls * times, hidden),
        Traffic("all_gather", "updated weights", size * partition.padded, 1),
        _small(stage, zero),
    ]


def _small(stage: int, zero: ZeroSettings) -> Traffic:
    """What every step tells besides: our counts and, where gradients are partitioned, DeepSpeed's two checks."""
    checks = CHECKS_BYTES[stage]
    if stage in (1, 2) and zero.precision == "fp32":
        checks = checks[:1]
    return Traffic("all_reduce", "counts, norm, overflow", COUNTS_BYTES + sum(checks), 1 + len(checks))


def _stage_3(zero: ZeroSettings, partition: Partition, accumulation: int) -> list[Traffic]:
    """Weights gathered for the forward pass, and for the backward pass where they were let go; gradients scattered."""
    cut = [numel for numel in partition.numels if numel > zero.persistence_threshold]
    kept_for_backward = zero.keeps_gathered(partition)
    gathered = zero.element_bytes * sum(-(-numel // partition.ranks) * partition.ranks for numel in cut)
    persistent = zero.element_bytes * (partition.elements - sum(cut))
    scattered = zero.element_bytes * partition.shards * partition.ranks
    buckets = _filled_buckets(partition.numels, zero.reduce_bucket)
    calls = len(cut) * accumulation
    forward = Traffic("all_gather", "weights", gathered * accumulation, calls, zero.overlap_comm)
    backward = replace(forward, what="weights, for the backward pass", local=zero.hpz > 1)
    return [
        *([forward] if kept_for_backward else [forward, backward]),
        Traffic("all_gather", "small weights, after the step", persistent, len(partition.numels) - len(cut)),
        Traffic("reduce_scatter", "gradients", scattered * accumulation, buckets * accumulation, zero.overlap_comm),
    ]


def _filled_buckets(numels: list[int], bucket: int) -> int:
    """Buckets that ZeRO sends: one is sent when the next parameter would not fit (parameters come from the end)."""
    sent, filled = 0, 0
    for numel in reversed(numels):
        if filled and filled + numel > bucket:
            sent, filled = sent + 1, 0
        filled += numel
    return sent + 1


def _reduces(partition: Partition, bucket: int) -> int:
    """Reduces to an owner: one for each bucket and each rank that owns a part of it."""
    calls, owners, filled, end = 0, set[int](), 0, partition.elements
    for numel in reversed(partition.numels):
        if filled and filled + numel > bucket:
            calls, owners, filled = calls + len(owners), set(), 0
        owners |= set(range((end - numel) // partition.share, (end - 1) // partition.share + 1))
        filled, end = filled + numel, end - numel
    return calls + len(owners)


def _full_buckets(numels: list[int], bucket: int) -> int:
    """Buckets that are sent once they have passed their size."""
    sent, filled = 0, 0
    for numel in numels:
        filled += numel
        if filled > bucket:
            sent, filled = sent + 1, 0
    return sent + (1 if filled else 0)


def bytes_per_second(device: Device, nodes: int) -> float:
    """Rate at which a rank sends in a ring over all ranks.

    Within a machine that is its own link; over several, the rings together use all network cards, so that no rank sends
    faster than the machine's network carries.
    """
    rate = device.local_bytes_per_second
    if nodes > 1:
        rate = min(rate, device.network_bytes_per_second)
    return LINK_SHARE * rate
