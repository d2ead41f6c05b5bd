"""The JSON's ZeRO section in numbers: how many elements each rank holds, and the sizes of buckets.

As DeepSpeed 0.19.8 does it (runtime/zero/stage_1_and_2.py, stage3.py, runtime/fp16/fused_optimizer.py). The
partitioning itself is ZeRO's (Rajbhandari et al. 2020, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from dwt_ds.models.build import DTYPES

# fp32 numbers that an optimizer keeps per element besides the weight itself, where these are not two; and settings of
# `params` that add one each.
_MOMENTS = {"lion": 1, "adagrad": 1, "rmsprop": 1, "sgd": 0}
_ADD_ONE = {
    **dict.fromkeys(("adam", "adamw"), ("amsgrad",)),
    "rmsprop": ("momentum", "centered"),
    "sgd": ("momentum",),
}

# Elements of a bucket without ZeRO: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE.
STAGE_0_BUCKET = 500_000_000


@dataclass(frozen=True)
class Partition:
    """Parameters partitioned over `ranks` ranks."""

    numels: list[int]
    """Elements of each parameter, in order."""
    ranks: int

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return sum(self.numels)

    @property
    def padded(self) -> int:
        """The flat buffer of stages 1 and 2: a multiple of twice the ranks."""
        step = 2 * self.ranks
        return -(-self.elements // step) * step

    @property
    def share(self) -> int:
        """One rank's part of the flat buffer."""
        return self.padded // self.ranks

    @property
    def touched(self) -> int:
        """Elements of all parameters that are at least partly in one rank's part; the most of any rank."""
        edges = [0, *accumulate(self.numels)]
        places, share = list(zip(self.numels, edges, edges[1:])), self.share
        begins = range(0, self.elements, share)
        return max(sum(n for n, left, right in places if left < at + share and right > at) for at in begins)

    @property
    def shards(self) -> int:
        """One rank's part in stage 3, where every parameter is sharded by itself."""
        return sum(-(-numel // self.ranks) for numel in self.numels)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.numels)


@dataclass(frozen=True)
class ZeroSettings:
    """Keys of the JSON that affect memory or traffic, with DeepSpeed's defaults."""

    precision: str
    reduce_bucket: int
    contiguous_gradients: bool
    overlap_comm: bool
    multi_rank_all_reduce: bool
    """Gradients of several ranks in one all-reduce (DeepSpeed's default) rather than a reduce to each owner."""
    optimizer_on_cpu: bool
    parameters_on_cpu: bool
    max_live_parameters: int
    max_reuse_distance: int
    persistence_threshold: int
    prefetch_bucket: int
    hpz: int
    """Ranks over which ZeRO++ shards a second copy of the weights, for the backward pass (1: none)."""
    master_bytes: int
    """Bytes of a number of the master weights and the optimizer state: 4, or 2 where the JSON keeps them in bf16."""
    moments: float
    """Numbers of optimizer state per element; a mean with Muon, which keeps fewer of matrices."""
    staged_share: float
    """Of all elements, those of which Muon stages the next momentum until the step is taken."""
    one_buffer: bool
    """Whether a rank's gradients may be in one buffer (engine/gradients.py), if a bucket holds them."""

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or gradient, in memory and in collectives."""
        return DTYPES[self.precision].itemsize

    def persistent_elements(self, partition: Partition) -> int:
        """Elements of the small parameters, which stage 3 keeps whole on every rank."""
        return sum(numel for numel in partition.numels if numel <= self.persistence_threshold)

    def sharded_weights(self, partition: Partition) -> tuple[int, int]:
        """(bytes, number) of the larger parameters, of which stage 3 gives each rank a shard; shards are equally large,
        so the last is padded."""
        numels = [numel for numel in partition.numels if numel > self.persistence_threshold]
        padded = sum(-(-numel // partition.ranks) * partition.ranks for numel in numels)
        return self.element_bytes * padded, len(numels)

    def keeps_gathered(self, partition: Partition) -> bool:
        """Whether stage 3 keeps what it gathered for the forward pass until the backward pass.

        It does where a parameter's next use lies within `stage3_max_reuse_distance` elements, or within what it
        fetches ahead, provided that these are no more than `stage3_max_live_parameters`.
        """
        sharded = partition.elements - self.persistent_elements(partition)
        within_reach = self.max_reuse_distance >= 2 * partition.elements or self.prefetch_bucket >= sharded
        return within_reach and self.max_live_parameters >= sharded

    def flat_gradients(self, partition: Partition) -> bool:
        """Whether a rank's gradients are in one buffer."""
        return self.one_buffer and partition.elements <= self.reduce_bucket

    def gathered_bytes(self, partition: Partition) -> int:
        """Bytes of whole parameters that stage 3 has gathered at a time.

        With DeepSpeed's defaults all of a model below 500M parameters; see `keeps_gathered`.
        """
        gathered = partition.elements - self.persistent_elements(partition)
        if not self.keeps_gathered(partition):
            ahead = self.max_reuse_distance + self.prefetch_bucket + partition.largest
            gathered = min(gathered, self.max_live_parameters, ahead)
        return self.element_bytes * gathered


def zero_settings(ds_values: dict[str, Any], precision: str, stage: int, muon_share: float = 0.0) -> ZeroSettings:
    """The settings of a resolved JSON, as they would be at `stage`; Muon would train `muon_share` of all elements."""
    section = ds_values.get("zero_optimization", {})
    overlap = section.get("overlap_comm")
    optimizer = ds_values.get("optimizer", {})
    in_gradients_dtype = _is_muon(optimizer) and stage in (1, 2) and _device(section, "offload_optimizer") == "none"
    moments = _moments(optimizer)
    if _is_muon(optimizer):
        of_a_matrix = DTYPES[precision].itemsize / 4 if in_gradients_dtype else 1
        moments = 2 * (1 - muon_share) + of_a_matrix * muon_share
    return ZeroSettings(
        precision=precision,
        reduce_bucket=int(section.get("reduce_bucket_size", 5e8)),
        contiguous_gradients=bool(section.get("contiguous_gradients", True)),
        overlap_comm=stage == 3 if overlap is None else bool(overlap),
        multi_rank_all_reduce=bool(section.get("use_multi_rank_bucket_allreduce", True)),
        optimizer_on_cpu=stage > 0 and _device(section, "offload_optimizer") != "none",
        parameters_on_cpu=stage == 3 and _device(section, "offload_param") != "none",
        max_live_parameters=int(section.get("stage3_max_live_parameters", 1e9)),
        max_reuse_distance=int(section.get("stage3_max_reuse_distance", 1e9)),
        persistence_threshold=int(section.get("stage3_param_persistence_threshold", 1e5)),
        prefetch_bucket=int(section.get("stage3_prefetch_bucket_size", 5e7)),
        hpz=int(section.get("zero_hpz_partition_size", 1)) if stage == 3 else 1,
        master_bytes=2 if ds_values.get("bf16", {}).get("bf16_optimizer_states") else 4,
        moments=moments,
        staged_share=muon_share if in_gradients_dtype else 0.0,
        one_buffer=stage == 2 and _has_one_buffer(ds_values, precision),
    )


def _has_one_buffer(ds_values: dict[str, Any], precision: str) -> bool:
    sums = (ds_values.get("data_types") or {}).get("grad_accum_dtype"), ds_values.get("communication_data_type")
    others = any(dtype not in (None, precision) for dtype in sums)
    muon = _is_muon(ds_values.get("optimizer", {}))
    section = ds_values.get("zero_optimization", {})
    owners = section.get("reduce_scatter", True) and not section.get("use_multi_rank_bucket_allreduce", True)
    return not (muon or others or owners) and _device(section, "offload_optimizer") == "none"


def _device(section: dict[str, Any], key: str) -> str:
    return str((section.get(key) or {}).get("device", "none"))


def _is_muon(optimizer: dict[str, Any]) -> bool:
    return str(optimizer.get("type", "")).lower() == "muon"


def _moments(optimizer: dict[str, Any]) -> float:
    name = str(optimizer.get("type", "AdamW")).lower()
    return _MOMENTS.get(name, 2) + sum(bool(optimizer.get("params", {}).get(key)) for key in _ADD_ONE.get(name, ()))
