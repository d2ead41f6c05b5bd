"""The guard against bad numbers, without a run."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dwt_ds.config.schema import TrainConfig
from dwt_ds.engine.loss_scale import skip_at_the_smallest_scale
from dwt_ds.run import guard as guard_module
from dwt_ds.run.guard import Guard, TooManySkipsError

SETTINGS = {"spike_sigma": 3.0, "spike_window": 4, "skip_window": 5, "max_skipped_share": 0.4}
INF = float("inf")
# Two spikes and three overflows; with the last, three of five steps were skipped.
LOSSES = [5.0, 5.1, 4.9, 5.0, 9.0, 5.05, INF, 4.95, 5.0, 5.1, 9.0, INF, INF]


def guard_of(state: dict[str, Any], divisor: int = 1, **settings: Any) -> Guard:
    return Guard(TrainConfig(**{**SETTINGS, **settings}), state, divisor)


def skips(guard: Guard, losses: list[float]) -> list[bool]:
    """Whether each step is skipped; ends with the step at which there were too many."""
    skipped = []
    for loss in losses:
        skipped.append(not bool(guard.poison(2 * torch.tensor(loss), torch.tensor(loss), last=True).isfinite()))
        try:
            guard.end_step(skipped[-1])
        except TooManySkipsError:
            break
    return skipped


def test_spikes_and_overflows_are_skipped_until_there_are_too_many() -> None:
    expected = [loss > 6 for loss in LOSSES]
    assert skips(guard_of({}), [*LOSSES, 5.0]) == expected
    with pytest.raises(TooManySkipsError, match="3 of the last 5 steps were skipped.*; lower train.learning_rate"):
        guard_of({"recent_skips": [True, False, False, True]}).end_step(True)


def test_a_larger_weight_is_no_spike() -> None:
    guard = guard_of({})
    skips(guard, LOSSES[:4])
    assert guard.poison(torch.tensor(50.0), torch.tensor(5.0), last=True) == 50


@pytest.mark.parametrize("last", [False, True])
def test_a_loss_that_is_not_finite_is_bad_before_the_window_is_full(last: bool) -> None:
    assert guard_of({}).poison(torch.tensor(INF), torch.tensor(5.0), last=last).isnan()


def test_a_steps_loss_is_summed_over_the_ranks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[float] = []
    monkeypatch.setattr(guard_module.ranks, "reduce_sum", lambda values: (sums.append(float(values)), values)[1])
    guard = guard_of({})
    for hard, last in ((2.0, False), (3.0, True)):
        guard.poison(torch.tensor(hard), torch.tensor(hard), last=last)
    assert sums == [5.0]


@pytest.mark.parametrize("done", range(len(LOSSES)))
def test_a_resumed_run_equals_one_without_a_stop(done: int) -> None:
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
    assert second.state_dict() == {"recent_skips": [True, False, True], "step_losses": pytest.approx([5.0, 5.05])}


def test_a_resume_may_have_another_number_of_ranks_or_micro_batches() -> None:
    """DeepSpeed divides by their number, so the losses that the guard sees grow with it."""
    first = guard_of({}, divisor=2)
    assert not any(skips(first, [2 * loss for loss in LOSSES[:4]]))
    for state in (first.state_dict(), {"recent_skips": [], "losses": [8 * loss for loss in LOSSES[:4]]}):
        assert skips(guard_of(state, divisor=8), [8 * 5.0, 8 * 9.0, 8 * 5.05]) == [False, True, False]


def test_a_run_that_ended_by_skips_resumes_at_a_good_step() -> None:
    ended = guard_of({}, spike_sigma=None)
    for _ in range(2):
        ended.end_step(True)
    with pytest.raises(TooManySkipsError, match="3 of the last 3 steps"):
        ended.end_step(True)
    again = guard_of(json.loads(json.dumps(ended.state_dict())), spike_sigma=None)
    for _ in range(2):
        again.end_step(False)
    with pytest.raises(TooManySkipsError, match="3 of the last 5 steps"):
        again.end_step(True)


def test_overflows_of_fp16_at_the_lowest_scale_are_left_to_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own scaler, with the numbers of zero2_fp16.json: of itself it raises at the 18th skip."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)

    def scaler() -> Any:
        return loss_scaler.DynamicLossScaler(2**16, 1000, 1, delayed_shift=2, consecutive_hysteresis=False)

    alone = scaler()
    for _ in range(17):
        alone.update_scale(True)
    with pytest.raises(Exception, match="already at minimum"):
        alone.update_scale(True)

    student = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler()))
    skip_at_the_smallest_scale(student.optimizer)
    skip_at_the_smallest_scale(object())
    watched = Guard(TrainConfig(), {}, 1)
    for _ in range(30):
        student.optimizer.loss_scaler.update_scale(True)
        watched.end_step(True)
    with pytest.raises(TooManySkipsError):
        watched.end_step(True)
    assert student.optimizer.loss_scaler.cur_scale == 1
