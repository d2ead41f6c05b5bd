"""Operations, seconds and hours of a run, and what the ranks' traffic leaves of the ideal speed."""

from __future__ import annotations

from dataclasses import dataclass

from dwt_ds.plan.communication import Traffic, bytes_per_second
from dwt_ds.plan.hardware import Device


@dataclass(frozen=True)
class Work:
    """Operations for one row of the data."""

    student_forward: int
    teacher_forward: int
    recomputed: int = 0
    """Of the student's forward pass, done again in the backward pass (activation checkpointing): time, but no work."""

    @property
    def per_row(self) -> int:
        """What the models need: forward and twice as much backward for the student, forward alone for the teacher."""
        return 3 * self.student_forward + self.teacher_forward


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    traffic: float
    """All collectives, hidden or not."""
    exposed: float
    """The part of the traffic that training waits for."""

    @property
    def total(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """Share of the speed that as many ranks would have if talking took no time."""
        return self.compute / self.total


def step_time(
    work: Work, traffic: list[Traffic], device: Device, *, precision: str, mfu: float, rows: int, nodes: int, ranks: int
) -> StepTime:
    """Time of a step in which each rank computes `rows` rows, all micro-batches together.

    Traffic that overlaps the backward pass costs nothing as long as it is shorter; the last bucket always waits.
    """
    row_seconds = rows / (mfu * device.flops_per_second(precision))
    compute = (work.per_row + work.recomputed) * row_seconds
    backward = (2 * work.student_forward + work.recomputed) * row_seconds
    seconds = {each.what: traffic_seconds(each, device, nodes, ranks) for each in traffic}
    exposed = 0.0
    for each in traffic:
        last = seconds[each.what] / max(1, each.calls)
        exposed += max(last, seconds[each.what] - backward) if each.hidden else seconds[each.what]
    return StepTime(compute, sum(seconds.values()), exposed)


def traffic_seconds(traffic: Traffic, device: Device, nodes: int, ranks: int) -> float:
    """Time of one kind of collective: over all machines, or within each where every group has a machine's ranks."""
    within = (ranks // nodes) % traffic.group_of(ranks) == 0
    return traffic.seconds(ranks, bytes_per_second(device, 1 if within else nodes))
