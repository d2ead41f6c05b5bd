"""The guard against bad numbers, without a run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dwt_ds.config import TrainConfig
from dwt_ds.guard import Guard, TooManySkipsError

SETTINGS = {"spike_sigma": 3.0, "spike_window": 4, "skip_window": 5, "max_skipped_share": 0.4}
INF = float("inf")
# Two spikes and three overflows; with the last, three of five steps were skipped.
LOSSES = [5.0, 5.1, 4.9, 5.0, 9.0, 5.05, INF, 4.95, 5.0, 5.1, 9.0, INF, INF]


def guard_of(state: dict[str, Any], **settings: Any) -> Guard:
    return Guard(TrainConfig(**{**SETTINGS, **settings}), lambda total: total, torch.device("cpu"), state)


def skips(guard: Guard, losses: list[float]) -> list[bool]:
    """Whether each step is skipped; ends with the step at which there were too many."""
    skipped = []
    for loss in losses:
        skipped.append(not bool(guard.poison(torch.tensor(loss), last=True).isfinite()))
        try:
            guard.end_step(skipped[-1])
        except TooManySkipsError:
            break
    return skipped


def test_spikes_and_overflows_are_skipped_until_there_are_too_many() -> None:
    expected = [loss > 6 for loss in LOSSES]
    assert skips(guard_of({}), [*LOSSES, 5.0]) == expected
    with pytest.raises(TooManySkipsError, match="3 of the last 5 steps were skipped"):
        guard_of({"recent_skips": [True, False, False, True]}).end_step(True)


@pytest.mark.parametrize("done", range(len(LOSSES)))
def test_a_resume_goes_on_as_if_there_had_been_none(done: int) -> None:
    """A window half full or half gone, and skips on both sides of the cut."""
    first = guard_of({})
    before = skips(first, LOSSES[:done])
    second = guard_of(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert before + skips(second, [*LOSSES[done:], 5.0]) == [loss > 6 for loss in LOSSES]


def test_a_resume_with_smaller_windows_keeps_the_newest() -> None:
    first = guard_of({})
    skips(first, LOSSES[:7])
    second = guard_of(first.state_dict(), spike_window=2, skip_window=3)
    assert second.state_dict() == {"recent_skips": [True, False, True], "losses": pytest.approx([5.0, 5.05])}
