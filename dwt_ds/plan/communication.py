"""What the ranks send each other in an optimizer step, and how long it takes.

Bytes are those of the tensors passed to the collectives. In a ring all-reduce of n bytes over N ranks each rank sends
2 (N - 1) / N x n, in an all-gather or reduce-scatter half of that (Patarasuk and Yuan 2009; Rajbhandari et al. 2020,
section 7, counts ZeRO's traffic in the same way).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dwt_ds.config.schema import RunConfig
from dwt_ds.plan.hardware import LATENCY_SECONDS, LINK_SHARE, Device
from dwt_ds.plan.zero import STAGE_0_BUCKET, Partition, ZeroSettings

# Passes of a ring over its data: bytes that a rank sends, as a multiple of (N - 1) / N x bytes.
_PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1}

# Our own sums over all ranks before each step: rows of the three losses, real tokens, requests to stop.
COUNTS_BYTES = 5 * 8

# Also our own, fp32: the step's loss, for the guard against spikes, and its means, three or more, for the adaptive
# weight.
SPIKE_BYTES = MEAN_BYTES = 4

# The gradient norm under ZeRO, in fp64. Without ZeRO, whole gradients are on every rank.
NORM_BYTES = 8


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one optimizer step."""

    collective: str
    what: str
    bytes: int
    """Of the tensors, in the whole step."""
    calls: int
    hidden: bool = False
    """Whether it overlaps the backward pass (overlap_comm)."""
    group: int | None = None
    """Consecutive ranks that communicate with each other; None: all ranks."""

    def group_of(self, ranks: int) -> int:
        """Ranks that communicate with each other, in a run of `ranks`."""
        return ranks if self.group is None else self.group

    def sent_bytes(self, ranks: int) -> float:
        """Bytes that each rank sends."""
        group = self.group_of(ranks)
        return _PASSES[self.collective] * (group - 1) / group * self.bytes

    def seconds(self, ranks: int, bytes_per_second: float) -> float:
        """Seconds on links of this rate."""
        latency = self.calls * LATENCY_SECONDS * math.ceil(math.log2(self.group_of(ranks)))
        return self.sent_bytes(ranks) / bytes_per_second + latency


def own_sums(config: RunConfig) -> list[int]:
    """Bytes of each sum over the ranks that this package does itself in an optimizer step.

    The sum of a logged step's losses is left out.
    """
    sums = [COUNTS_BYTES]
    if config.train.spike_sigma is not None:
        sums.append(SPIKE_BYTES)
    if config.distill.soft_weight.schedule == "adaptive" and config.teacher.path is not None:
        further = config.teacher.vocabulary == "shared" or config.distill.soft_positions != "labelled"
        sums.append((3 + further + bool(config.distill.hidden_weight)) * MEAN_BYTES)
    return sums


def step_traffic(
    stage: int, zero: ZeroSettings, partition: Partition, accumulation: int, own: Sequence[int]
) -> list[Traffic]:
    """The collectives of one optimizer step at a ZeRO stage; none for a single rank.

    `accumulation` is the number of micro-batches per step, `own` are the bytes from `own_sums`.
    """
    if partition.ranks == 1:
        return []
    if stage == 0:
        calls = _full_buckets(partition.numels, STAGE_0_BUCKET)
        large = [Traffic("all_reduce", "gradients", zero.element_bytes * partition.elements, calls)]
    elif stage == 3:
        large = _stage_3(zero, partition, accumulation)
    else:
        large = _stages_1_and_2(stage, zero, partition, accumulation)
    small = [*own, *([NORM_BYTES] if stage else [])]
    return [*large, Traffic("all_reduce", "counts, norm and the like", sum(small), len(small))]


def _stages_1_and_2(stage: int, zero: ZeroSettings, partition: Partition, accumulation: int) -> list[Traffic]:
    """Gradients reduced, weights gathered.

    ZeRO-2 reduces in every micro-batch, since a rank keeps only its own part; ZeRO-1 once per step.
    """
    size = zero.element_bytes
    times = accumulation if stage == 2 else 1
    buckets = list(_buckets(partition, zero.reduce_bucket))
    hidden = zero.overlap_comm and len(buckets) > 1
    kind, calls = "all_reduce", len(buckets)
    if not zero.multi_rank_all_reduce:  # one for each bucket and each rank that owns a part of it
        kind, calls = "reduce", sum((e - 1) // partition.share - b // partition.share + 1 for b, e in buckets)
    elements = partition.padded if zero.flat_gradients(partition) else partition.elements
    return [
        Traffic(kind, "gradients", size * elements * times, calls * times, hidden),
        Traffic("all_gather", "updated weights", size * partition.padded, 1),
    ]


def _stage_3(zero: ZeroSettings, partition: Partition, accumulation: int) -> list[Traffic]:
    """Weights gathered for the forward pass, and again for the backward pass if released; gradients scattered."""
    gathered, weights = zero.sharded_weights(partition)
    kept_for_backward = zero.keeps_gathered(partition)
    persistent = zero.element_bytes * zero.persistent_elements(partition)
    scattered = zero.element_bytes * partition.shards * partition.ranks
    buckets = len(list(_buckets(partition, zero.reduce_bucket)))
    forward = Traffic("all_gather", "weights", gathered * accumulation, weights * accumulation, zero.overlap_comm)
    group = min(zero.hpz, partition.ranks) if zero.hpz > 1 else None
    backward = replace(forward, what="weights, for the backward pass", group=group)
    return [
        *([forward] if kept_for_backward else [forward, backward]),
        Traffic("all_gather", "small weights, after the step", persistent, len(partition.numels) - weights),
        Traffic("reduce_scatter", "gradients", scattered * accumulation, buckets * accumulation, zero.overlap_comm),
    ]


def _buckets(partition: Partition, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the buckets that ZeRO sends, in the flat buffer: one is sent when the next parameter would not
    fit (the last parameter comes first)."""
    begin = end = partition.elements
    for numel in reversed(partition.numels):
        if begin < end and end - begin + numel > size:
            yield begin, end
            end = begin
        begin -= numel
    yield begin, end


def _full_buckets(numels: list[int], bucket: int) -> int:
    """Buckets sent where one is sent as soon as it exceeds its size."""
    sent, filled = 0, 0
    for numel in numels:
        filled += numel
        if filled > bucket:
            sent, filled = sent + 1, 0
    return sent + (1 if filled else 0)


def bytes_per_second(device: Device, nodes: int) -> float:
    """Rate at which a rank sends in a ring over all ranks.

    Within a machine it is the rank's own link. Over several machines the rings together use all network cards, so no
    rank sends faster than the machine's network.
    """
    rate = device.local_bytes_per_second
    if nodes > 1:
        rate = min(rate, device.network_bytes_per_second)
    return LINK_SHARE * rate
