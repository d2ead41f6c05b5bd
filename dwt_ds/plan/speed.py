"""Seconds of a step, and what the ranks' traffic leaves of the ideal speed."""

from __future__ import annotations

from dataclasses import dataclass

from dwt_ds.models.flops import Work
from dwt_ds.plan.communication import Traffic, bytes_per_second
from dwt_ds.plan.hardware import Device


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    traffic: float
    """All collectives, hidden or not."""
    exposed: float
    """Traffic that training waits for."""

    @property
    def total(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """Share of the speed that the ranks would have if communication took no time."""
        return self.compute / self.total


def step_time(
    work: Work, traffic: list[Traffic], device: Device, *, precision: str, rows: int, nodes: int, ranks: int
) -> StepTime:
    """Time of a step in which each rank computes `rows` rows, all micro-batches together.

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
    return StepTime(compute, sum(seconds.values()), exposed)


def traffic_seconds(traffic: Traffic, device: Device, nodes: int, ranks: int) -> float:
    """Seconds of one kind of collective: over all machines, or within each if no group spans two of them."""
    within = (ranks // nodes) % traffic.group_of(ranks) == 0
    return traffic.seconds(ranks, bytes_per_second(device, 1 if within else nodes))
