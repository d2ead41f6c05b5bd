"""Counts and clocks of a run, on one rank and on a clock that the test turns."""

from __future__ import annotations

import pytest
import torch

from dwt_ds.distill.objective import Losses
from dwt_ds.engine import ranks
from dwt_ds.run import meter
from dwt_ds.run.meter import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    return now


def loss(total: float, hard: float, soft: float) -> Losses:
    return Losses(torch.tensor(total, requires_grad=True), torch.tensor(hard), torch.tensor(soft))


def test_the_losses_of_a_step_are_summed_over_micro_batches_and_ranks(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = []

    def reduce_sum(values: torch.Tensor) -> torch.Tensor:
        sums.append(values)
        return values + torch.tensor([10.0, 20.0, 30.0])

    monkeypatch.setattr(ranks, "reduce_sum", reduce_sum)
    counted = Meter(0, 0.0, 4)
    for first in (1.0, 7.0):  # the second step starts from nothing
        counted.begin_step(torch.tensor(5))
        counted.add(loss(first, 2.0, 3.0))
        counted.add(loss(4.0, 5.0, 6.0))
        for _ in range(2):
            losses = {name: float(value) for name, value in counted.losses().items()}
            assert losses == {"loss": (first + 4 + 10) / 4, "hard": 27 / 4, "soft": 39 / 4}
        assert counted.row()["hard_loss"] == 27 / 4
    assert len(sums) == 2, "one sum over the ranks a step, whoever asks"


def test_a_row_has_rates_since_the_last_one_without_pauses(clock: list[float]) -> None:
    counted = Meter(1000, 50.0, 1)
    counted.begin_step(torch.tensor(300))
    counted.add_wait(1.0)
    counted.begin_step(torch.tensor(500))
    counted.add_wait(0.5)
    clock[0] += 4.0
    row = counted.row()
    assert (row["tokens"], row["tokens_per_second"]) == (1800, 200.0)
    assert (row["elapsed_seconds"], row["data_wait_share"]) == (54.0, 0.375)

    counted.begin_step(torch.tensor(600))
    counted.add_pause(3.0)
    clock[0] += 5.0
    row = counted.row()
    assert (row["tokens"], row["tokens_per_second"]) == (2400, 300.0)
    assert (row["elapsed_seconds"], row["data_wait_share"]) == (59.0, 0.0)
    assert counted.tokens == 2400
    assert (counted.elapsed_seconds, counted.seconds_since_start) == (59.0, 9.0)


def test_a_resume_counts_from_where_the_last_start_ended(clock: list[float]) -> None:
    first = Meter(0, 0.0, 1)
    first.begin_step(torch.tensor(40))
    clock[0] += 2.0
    second = Meter(first.tokens, first.elapsed_seconds, 1)
    second.begin_step(torch.tensor(60))
    clock[0] += 3.0
    row = second.row()
    assert (row["tokens"], row["tokens_per_second"], row["elapsed_seconds"]) == (100, 20.0, 5.0)
