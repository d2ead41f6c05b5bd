"""Seconds of a step: what the device computes, what the host starts on it, and what the ranks send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dwt_ds.models.flops import Work
from dwt_ds.plan.communication import Traffic, bytes_per_second
from dwt_ds.plan.hardware import Device
from dwt_ds.plan.simulation import MicroBatchCost

REPLAY_LAUNCHES = 4
"""Of a teacher's forward pass as a CUDA graph: tokens and positions are copied in, it runs, its output is copied."""

TRAINING_REPLAY_LAUNCHES = 24
"""Of a student's forward and backward pass as CUDA graphs: tokens, the teacher's hidden states and the step's numbers
are copied in, both run, the losses are copied out. And what the loop does with these."""

SHARED_LOSS_LAUNCHES, FURTHER_LOSS_LAUNCHES = 21, 9
"""Of a second loss in a micro-batch: on the entries that another vocabulary shares, or on unlabelled tokens."""

# Operations of the loss and of the loop in a micro-batch; one more a trained tensor adds up its gradient.
_LOSS_LAUNCHES = 21


class _Launches(NamedTuple):
    """Operations of DeepSpeed in a step."""

    step: int
    """However many tensors are trained."""
    micro_batch: float = 0.0
    """For each trained tensor, in each micro-batch."""
    further: float = 0.0
    """For each trained tensor, in each micro-batch but the first."""
    once: float = 0.0
    """For each trained tensor, once a step."""


# By ZeRO stage. tests/engine/test_step_cost.py counts them in DeepSpeed 0.19.8.
_STAGES = {
    0: _Launches(11),
    1: _Launches(20, once=1.0),
    2: _Launches(20, further=2.0, once=1.0),
    3: _Launches(46, micro_batch=1.4),
}
# Stage 2 with the gradients in one buffer.
_ONE_BUFFER = _Launches(14)


def step_launches(
    stage: int,
    micro: MicroBatchCost,
    tensors: int,
    accumulation: int,
    *,
    flat: bool,
    replayed: bool,
    teacher_launches: int,
    second_loss: int,
) -> int:
    """Operations that one rank starts on its device in an unlogged step, offload not counted.

    Args:
        tensors: parameters that are trained.
        accumulation: micro-batches of a step.
        flat: whether the gradients are in one buffer.
        replayed: whether training passes are CUDA graphs.
        teacher_launches: operations of the teacher's forward pass; 0 without one.
        second_loss: those of a second loss; 0 without one.
    """
    cost = _ONE_BUFFER if flat else _STAGES[stage]
    a_pass = micro.launches + _LOSS_LAUNCHES + second_loss + tensors * (1 + cost.micro_batch)
    a_micro_batch = teacher_launches + (TRAINING_REPLAY_LAUNCHES if replayed else a_pass)
    further = (accumulation - 1) * tensors * cost.further
    return round(accumulation * a_micro_batch + further + cost.step + tensors * cost.once)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    """The device, at its MFU."""
    host: float
    """The host, which starts operations while the device computes; 0 on a CPU, whose MFU has it already."""
    traffic: float
    """All collectives, hidden or not."""
    exposed: float
    """Traffic that training waits for."""

    @property
    def total(self) -> float:
        return self.busy + self.exposed

    @property
    def busy(self) -> float:
        """The device or the host, whichever takes longer."""
        return max(self.compute, self.host)

    @property
    def efficiency(self) -> float:
        """Share of the speed that the ranks would have if communication took no time."""
        return self.busy / self.total


def step_time(
    work: Work,
    traffic: list[Traffic],
    device: Device,
    *,
    launches: int,
    precision: str,
    rows: int,
    nodes: int,
    ranks: int,
) -> StepTime:
    """Time of a step in which each rank computes `rows` rows, all micro-batches together, with `launches` operations.

    Traffic that overlaps the backward pass is free as long as it is shorter; training always waits for the last bucket.
    """
    row_seconds = rows / (device.mfu * device.flops_per_second(precision))
    compute = (work.per_row + work.recomputed) * row_seconds
    backward = (2 * work.student_forward + work.recomputed) * row_seconds
    seconds = {each.what: traffic_seconds(each, device, nodes, ranks) for each in traffic}
    exposed = 0.0
    for each in traffic:
        last = seconds[each.what] / max(1, each.calls)
        exposed += max(last, seconds[each.what] - backward) if each.hidden else seconds[each.what]
    host = max(launches * device.launch_seconds, device.least_step_seconds)
    return StepTime(compute, host, sum(seconds.values()), exposed)


def traffic_seconds(traffic: Traffic, device: Device, nodes: int, ranks: int) -> float:
    """Seconds of one kind of collective: over all machines, or within each if no group spans two of them."""
    within = (ranks // nodes) % traffic.group_of(ranks) == 0
    return traffic.seconds(ranks, bytes_per_second(device, 1 if within else nodes))
