"""Bytes of one rank's memory, part by part, at each ZeRO stage; bytes of a checkpoint and an export on disk.

The peak is that of the moment of an optimizer step at which most is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

from dwt_ds.plan.simulation import MicroBatchCost
from dwt_ds.plan.zero import STAGE_0_BUCKET, Partition, ZeroSettings

STAGES = (0, 1, 2, 3)

WEIGHTS, MASTER, OPTIMIZER = "weights", "fp32 master weights", "optimizer state"
GRADIENTS, BUCKETS, TEACHER = "gradients", "communication buckets", "teacher"
ACTIVATIONS, LOSS, TEMPORARIES = "activations", "loss: logits, head gradients", "temporaries"
PARTS = (WEIGHTS, MASTER, OPTIMIZER, GRADIENTS, BUCKETS, TEACHER, ACTIVATIONS, LOSS, TEMPORARIES)

Parts = dict[str, int]


@dataclass(frozen=True)
class RankMemory:
    """One rank's memory at one ZeRO stage."""

    moments: dict[str, Parts]
    """Bytes by part at the moments that can be the peak: teacher, loss, backward pass, reduction, optimizer step."""
    host: Parts
    """Bytes by part in the host's memory, if the JSON offloads to it."""

    @property
    def fullest(self) -> str:
        """The moment with most bytes."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.moments[self.fullest].values())

    @property
    def most(self) -> Parts:
        """Most bytes of each part at any moment; they do not all occur at once."""
        return {part: max(parts[part] for parts in self.moments.values()) for part in PARTS}


def rank_memory(
    stage: int,
    zero: ZeroSettings,
    partition: Partition,
    micro: MicroBatchCost,
    *,
    frozen_bytes: int,
    teacher_bytes: int,
    teacher_gathered_bytes: int,
    teacher_graph_bytes: int,
    accumulation: int,
    replayed: bool = False,
) -> RankMemory:
    """Memory of a rank at `stage`.

    Args:
        zero, partition: the JSON's numbers at that stage, and how the trainable parameters are partitioned.
        micro: what one micro-batch adds.
        frozen_bytes: parameters and buffers of the student that are not trained.
        teacher_bytes: the teacher's weights that a rank keeps between steps.
        teacher_gathered_bytes: what its forward pass gathers at a time, if it is sharded.
        teacher_graph_bytes: what its CUDA graph keeps from step to step: as much as a pass needs.
        accumulation: micro-batches per step.
        replayed: whether training passes are CUDA graphs, which keep their memory from step to step.
    """
    held, host = _held(stage, zero, partition)
    held[WEIGHTS] += frozen_bytes
    held[TEACHER] = teacher_bytes + teacher_graph_bytes
    earlier = _waiting(stage, zero, partition) if accumulation > 1 else 0
    # Below stage 2 gradients are added in place; from stage 2 a new micro-batch's are beside the earlier ones.
    beside = earlier if stage >= 2 else 0
    bucket, copy = _buckets(stage, zero, partition)
    sent_at_the_end = stage <= 1 or partition.elements <= zero.reduce_bucket
    kept = micro.activations + micro.head_gradients

    gradients, temporaries = _at_step(stage, zero, partition)
    # The next step's first pass of the teacher is made before this step's update, where the norm is read late.
    ahead = gradients if stage in (1, 2) and not zero.optimizer_on_cpu else 0
    teacher = {
        **held,
        GRADIENTS: max(earlier, ahead),
        TEACHER: teacher_bytes + teacher_gathered_bytes,
        TEMPORARIES: micro.teacher_peak,
    }
    loss = {**held, GRADIENTS: earlier, ACTIVATIONS: micro.activations, LOSS: micro.loss_peak - micro.activations}
    backward = {
        **held,
        GRADIENTS: beside + _growing(stage, zero, partition),
        BUCKETS: bucket + (0 if sent_at_the_end else copy),
        ACTIVATIONS: micro.activations,
        LOSS: micro.head_gradients,
        TEMPORARIES: max(0, micro.backward_peak - kept),
    }
    reduction = {**held, GRADIENTS: beside + _reduced(stage, zero, partition), BUCKETS: bucket + copy}
    step = {**held, GRADIENTS: gradients, TEMPORARIES: temporaries}
    if stage == 3:
        for moment in (loss, backward):
            moment[WEIGHTS] += zero.gathered_bytes(partition)
        for moment in (teacher, loss, step):
            moment[BUCKETS] = bucket
    if zero.flat_gradients(partition):
        for moment in (teacher, loss, backward, reduction, step):
            moment[GRADIENTS] += zero.element_bytes * partition.padded
    if replayed:
        own = zero.element_bytes * partition.elements  # of the pass, before they are added to the buffer
        backward[TEMPORARIES] += own
        for moment in (teacher, reduction, step):
            # Gradients take the place of activations that the backward pass has freed.
            moment[ACTIVATIONS] = max(micro.loss_peak, micro.backward_peak, own)
    for moment in (reduction, step):
        moment[GRADIENTS] += int(zero.element_bytes * zero.staged_share * partition.share)
    moments = {
        "teacher": teacher,
        "loss": loss,
        "backward pass": backward,
        "reduction": reduction,
        "optimizer step": step,
    }
    return RankMemory({name: _ordered(parts) for name, parts in moments.items()}, host)


def _held(stage: int, zero: ZeroSettings, partition: Partition) -> tuple[Parts, Parts]:
    """What is kept between steps, on the device and on the host."""
    size = zero.element_bytes
    if stage == 0:
        # In fp32 without ZeRO the optimizer updates the weights themselves.
        master = 0 if zero.precision == "fp32" else 4 * partition.elements
        state = int(4 * zero.moments * partition.elements)
        return {WEIGHTS: size * partition.elements, MASTER: master, OPTIMIZER: state}, {}
    share = partition.shards if stage == 3 else partition.share
    weights = size * (partition.shards + zero.persistent_elements(partition) if stage == 3 else partition.padded)
    if zero.hpz > 1:  # ZeRO++ (Wang et al. 2023, section 3.2): the second copy
        weights += size * -(-partition.elements // zero.hpz)
    number = zero.master_bytes
    device: Parts = {WEIGHTS: weights, MASTER: number * share, OPTIMIZER: int(number * zero.moments * share)}
    host: Parts = {}
    if zero.optimizer_on_cpu:
        host = {MASTER: device[MASTER], OPTIMIZER: device[OPTIMIZER], GRADIENTS: number * share, BUCKETS: size * share}
        device[MASTER] = device[OPTIMIZER] = 0
    if zero.parameters_on_cpu:
        host[WEIGHTS] = size * partition.shards
        device[WEIGHTS] -= size * partition.shards
    return device, host


def _waiting(stage: int, zero: ZeroSettings, partition: Partition) -> int:
    """Gradients kept on the device from one micro-batch to the next."""
    if zero.flat_gradients(partition):
        return zero.element_bytes * partition.share
    if stage >= 2:
        return 0 if zero.optimizer_on_cpu else zero.element_bytes * _own_gradients(stage, partition)
    return zero.element_bytes * partition.elements


def _own_gradients(stage: int, partition: Partition) -> int:
    """Elements of the buffer for a rank's own gradients: whole parameters in stage 2."""
    return partition.shards if stage == 3 else partition.touched


def _growing(stage: int, zero: ZeroSettings, partition: Partition) -> int:
    """Gradients on the device during the backward pass, without the bucket or the buffer that is always there."""
    if zero.flat_gradients(partition):
        return 0
    if stage <= 1:
        return zero.element_bytes * partition.elements
    if stage == 3:
        return 0 if zero.optimizer_on_cpu else zero.element_bytes * partition.shards
    if not zero.contiguous_gradients:
        return zero.element_bytes * min(partition.elements, zero.reduce_bucket)
    reduced_early = partition.elements > zero.reduce_bucket
    return _reduced(stage, zero, partition) if reduced_early else 0


def _reduced(stage: int, zero: ZeroSettings, partition: Partition) -> int:
    """Gradients on the device once all are reduced, without the bucket or the buffer that is always there."""
    if zero.flat_gradients(partition):
        return 0
    size = zero.element_bytes
    if stage == 0:
        return size * partition.elements
    if zero.optimizer_on_cpu:
        return size * partition.largest  # on their way to the host
    return size * _own_gradients(stage, partition)


def _buckets(stage: int, zero: ZeroSettings, partition: Partition) -> tuple[int, int]:
    """Bytes of the bucket that collects gradients, and of the copy that is sent."""
    size, several = zero.element_bytes, partition.ranks > 1
    if zero.flat_gradients(partition):
        return 0, 0
    if stage == 0:
        return 0, size * min(partition.elements, STAGE_0_BUCKET) if several else 0
    bucket = size * zero.reduce_bucket * (2 if zero.overlap_comm and stage < 3 else 1)
    if not zero.contiguous_gradients:
        bucket = 0
    copy = size * min(partition.elements, zero.reduce_bucket) if several else 0
    return bucket, copy


def _at_step(stage: int, zero: ZeroSettings, partition: Partition) -> tuple[int, int]:
    """Gradients at the optimizer step, and temporaries of the norm and of the conversion to fp32."""
    size = zero.element_bytes
    if stage == 0:
        copies = 0 if zero.precision == "fp32" else 4 * partition.elements  # gradients in fp32
        return size * partition.elements, copies
    if zero.optimizer_on_cpu:
        return 0, 0
    if stage == 3:
        return size * partition.shards, 4 * partition.shards
    converted = 0 if zero.precision == "fp32" else 4 * partition.share
    if zero.flat_gradients(partition):
        return 0, converted
    own = size * partition.touched
    norm = 8 * min(partition.largest, partition.share)  # the norm is computed in fp64, one parameter at a time
    flat = size * partition.share
    return own, max(norm, flat + converted)


def _ordered(parts: Parts) -> Parts:
    return {name: parts.get(name, 0) for name in PARTS}


def checkpoint_bytes(stage: int, zero: ZeroSettings, partition: Partition, frozen_bytes: int) -> int:
    """All ranks' files together: weights in the training precision, fp32 master weights, optimizer state.

    Stage 3 writes no weights besides the master weights, which they are restored from.
    """
    master = 0 if stage == 0 and zero.precision == "fp32" else zero.master_bytes
    if stage == 0:
        elements = partition.elements
    else:
        elements = (partition.shards if stage == 3 else partition.share) * partition.ranks
    weights = 0 if stage == 3 else partition.elements
    return zero.element_bytes * weights + int((master + zero.master_bytes * zero.moments) * elements) + frozen_bytes


def export_bytes(parameters: int) -> int:
    """The exported model is in fp32, tied weights stored once."""
    return 4 * parameters
