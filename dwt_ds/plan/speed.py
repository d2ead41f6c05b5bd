"""Operations of a row, seconds of a step, and what the ranks' traffic leaves of the ideal speed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.plan.communication import Traffic, bytes_per_second
from dwt_ds.plan.hardware import Device


def forward_flops(gathered: GatheredMaskedLM, seq_len: int, labels_per_row: int, vocab_size: int) -> int:
    """Operations (a multiplication and an addition are two) of one row's forward pass, logits included.

    Matrix products are counted, attention's among them.
    """
    model = copy.deepcopy(gathered).eval()
    model.model.set_attn_implementation("eager")
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        hidden = model(torch.zeros(1, seq_len, dtype=torch.int64), None, torch.zeros(labels_per_row, dtype=torch.int64))
    return counter.get_total_flops() + 2 * labels_per_row * vocab_size * int(hidden.shape[-1])


def recomputed_flops(gathered: GatheredMaskedLM, seq_len: int, labels_per_row: int) -> int:
    """Operations of one row's forward pass that activation checkpointing repeats in the backward pass."""
    counts = []
    for checkpointing in (False, True):
        model = copy.deepcopy(gathered).train()
        model.model.set_attn_implementation("eager")
        if checkpointing:
            model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            positions = torch.zeros(labels_per_row, dtype=torch.int64)
            model(torch.zeros(1, seq_len, dtype=torch.int64), None, positions).sum().backward()
        counts.append(counter.get_total_flops())
    without, with_checkpointing = counts
    return int(with_checkpointing - without)


@dataclass(frozen=True)
class Work:
    """Operations per row of the data."""

    student_forward: int
    teacher_forward: int
    recomputed: int = 0
    """Of the student's forward pass, repeated in the backward pass (activation checkpointing): they take time."""

    @property
    def per_row(self) -> int:
        """Without repetitions: the student's forward pass and twice that backward, the teacher's forward pass."""
        return 3 * self.student_forward + self.teacher_forward


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
