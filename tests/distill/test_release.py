"""The rule that releases a teacher, as a function of the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.errors import error_of
from hypothesis import given
from hypothesis import strategies as st

from dwt_ds.config.objective import DistillConfig, Schedule
from dwt_ds.config.schema import RunConfig, TeacherConfig
from dwt_ds.distill.adaptive import AdaptiveWeight
from dwt_ds.distill.release import TeacherRelease, check_something_is_trained, work_left, zero_from
from dwt_ds.distill.schedules import value_at


def rule(schedule: Schedule, total_steps: int, **teacher: Any) -> TeacherRelease:
    config = RunConfig(teacher=TeacherConfig(**{"path": "a", **teacher}), distill=DistillConfig(soft_weight=schedule))
    return TeacherRelease(config, total_steps)


@pytest.mark.parametrize(
    ("schedule", "step"),
    [
        (Schedule("linear", 4.0, 0.0, span=0.5), 50),
        (Schedule("cosine", 4.0, 0.0, span=0.25), 25),
        (Schedule("cosine", 4.0, 0.0, span_steps=7), 7),
        (Schedule("step", 4.0, 0.0, span=0.3), 30),
        (Schedule("linear", 1.0, 0.0), 100),
        (Schedule("linear", 1.0, 0.0, span_steps=400), 400),
        (Schedule("constant", 0.0), 0),
        (Schedule("linear", 0.0, 0.0), 0),
        (Schedule("adaptive", 0.0), 0),
        (Schedule("learning_rate", 0.0), 0),
        (Schedule("linear", 0.0, 4.0), None),
        (Schedule("step", 0.0, 1.0), None),
        (Schedule("cosine", 4.0, 1.0, span=0.5), None),
        (Schedule("exponential", 4.0, 1e-9, span=0.5), None),
        (Schedule("constant", 1.0), None),
        (Schedule("adaptive", 4.0), None),
        (Schedule("adaptive", 4.0, 0.0), None),
        (Schedule("learning_rate", 4.0), None),
        (Schedule("learning_rate", 4.0, 0.0), None),
    ],
)
def test_a_schedule_says_when_it_is_0_for_good(schedule: Schedule, step: int | None) -> None:
    assert zero_from(schedule, 100) == step


@given(
    st.sampled_from(["linear", "cosine", "step"]),
    st.sampled_from([0.0, 1.0, 4.0]),
    st.sampled_from([0.0, 1.0]),
    st.floats(min_value=0.01, max_value=1.0),
    st.integers(min_value=1, max_value=60),
)
def test_the_weight_is_0_from_there_on_and_not_before(
    kind: Any, start: float, end: float, span: float, total_steps: int
) -> None:
    schedule = Schedule(kind, start, end, span=span)
    weights = [value_at(schedule, step, total_steps) for step in range(2 * total_steps + 2)]
    by_looking = next((step for step in range(len(weights)) if not any(weights[step:])), None)
    assert zero_from(schedule, total_steps) == by_looking
    due = [done for done in range(total_steps + 1) if rule(schedule, total_steps).is_due(done, None)]
    assert due == ([] if by_looking is None else list(range(by_looking, total_steps)))


def test_never_and_no_teacher_release_nothing() -> None:
    schedule = Schedule("linear", 4.0, 0.0, span=0.5)
    for it in (rule(schedule, 10, release="never"), rule(schedule, 10, path=None)):
        assert not any(it.is_due(done, None) for done in range(11))
        assert it.at_start(8, None) is None
    assert rule(schedule, 10, release="never").at_start(8, 5) is None


def test_a_start_knows_from_its_step_whether_the_teacher_is_needed() -> None:
    half = Schedule("linear", 4.0, 0.0, span=0.5)
    assert rule(half, 10).at_start(4, None) is None
    assert rule(half, 10).at_start(5, None) == 5
    assert rule(half, 10).at_start(8, 5) == 5
    assert rule(half, 10).at_start(8, None) == 8, "a checkpoint of a version that released no teacher"
    assert rule(half, 40).at_start(8, 5) is None, "a longer run, whose weight is not 0 yet"
    whole = Schedule("linear", 4.0, 0.0)
    assert rule(whole, 10).at_start(10, None) is None, "it was there to the end, and is for the last evaluation"
    for nothing in (Schedule("constant", 0.0), Schedule("adaptive", 0.0)):
        assert rule(nothing, 10).at_start(0, None) == 0
    adaptive = Schedule("adaptive", 4.0)
    assert rule(adaptive, 10).at_start(8, 5) == 5
    assert rule(adaptive, 10).at_start(8, None) is None
    assert rule(adaptive, 10).at_start(8, 5, same_rule=False) is None, "another teacher, weight or rule of release"


@pytest.mark.parametrize(("after", "released"), [(None, 70), (25, 40), (1, 20), (90, 110)])
def test_an_adaptive_weight_is_looked_at_now_and_then(after: int | None, released: int) -> None:
    """The student is as good as the teacher in the 11 steps before step 12, and better by far from there on."""
    schedule = Schedule("adaptive", start=4.0, signal="gap", width=0.5, average_steps=50)
    it = rule(schedule, 200, release_after_steps=after)
    weight, looked = AdaptiveWeight(schedule, 3.0, torch.device("cpu")), None
    for done in range(1, 200):
        weight.observe(torch.tensor(3.2 if done < 12 else -40.0), torch.tensor(1.0))
        if done == 15:  # a resume
            state, weight = weight.state_dict(), AdaptiveWeight(schedule, 0.0, torch.device("cpu"))
            weight.load_state_dict(state)
        if it.is_due(done, looked):
            break
        looked = float(weight.idle_steps) if it.looks(done) else None
    assert done == released
    # Step 13 is the first whose weight is 0.
    assert float(weight.idle_steps) == released - 12 > (after or 50)


def test_a_weight_that_has_been_low_for_as_long_as_asked_releases_the_teacher() -> None:
    it = rule(Schedule("adaptive", 4.0), 200, release_after_steps=7)
    assert [it.is_due(20, idle_steps) for idle_steps in (None, 6.0, 7.0)] == [False, False, True]


@pytest.mark.parametrize(
    ("done", "release", "left"), [(2, None, 8.0), (2, 6, 4 + 4 * 0.5), (6, 6, 4 * 0.5), (7, 6, 3 * 0.5), (2, 40, 8.0)]
)
def test_steps_after_the_release_are_counted_as_the_share_of_work_that_they_are(
    done: int, release: int | None, left: float
) -> None:
    assert work_left(done, 10, release, 0.5) == left


@pytest.mark.parametrize(
    # teacher 9.0, width 0.5: the share falls to 0 for 2.0, to 0.2 for 9.1
    ("end", "low_share", "hard", "idle"),
    [
        (0.05, 0.01, 2.0, 0.0),
        (0.03, 0.01, 2.0, 19.0),
        (None, 0.01, 9.1, 0.0),
        (None, 0.25, 9.1, 19.0),
        (None, 0.125, 9.1, 0.0),
        (1.0, 0.25, 2.0, 0.0),
        (0.9, 0.25, 2.0, 19.0),
    ],
)
def test_a_weight_above_a_share_of_its_start_is_not_low(
    end: float | None, low_share: float, hard: float, idle: float
) -> None:
    schedule = Schedule("adaptive", 4.0, end, signal="gap")
    weight = AdaptiveWeight(schedule, 9.0, torch.device("cpu"), low_share=low_share)
    for _ in range(20):
        weight.observe(torch.tensor(hard), torch.tensor(1.0))
    assert float(weight.idle_steps) == idle
    weight.observe(torch.tensor(9e9), torch.tensor(1.0))
    weight.observe(torch.tensor(9e9), torch.tensor(1.0))
    assert float(weight.idle_steps) == 0.0


def test_the_state_of_an_earlier_version_has_no_idle_steps() -> None:
    weight = AdaptiveWeight(Schedule("adaptive", 4.0), 3.0, torch.device("cpu"))
    weight.load_state_dict({"hard": 3.0, "soft": 1.0, "count": 5.0, "teacher_loss": 3.0})
    assert float(weight.idle_steps) == 0.0


@pytest.mark.parametrize(
    ("schedule", "teacher", "message"),
    [
        (Schedule(), {"path": None}, "without a teacher nothing is left to train on; set it above 0"),
        (Schedule("linear", 4.0, 0.0, span=0.5), {}, "after the teacher's release nothing is left"),
        (Schedule("adaptive", 4.0), {}, "after the teacher's release nothing is left"),
        (Schedule(start=0.0), {}, "after the teacher's release nothing is left"),
        (Schedule("linear", 4.0, 0.0), {}, None),  # 0 after the last step
        (Schedule("linear", 4.0, 0.0, span=0.5), {"release": "never"}, None),
        (Schedule("adaptive", 4.0, 1.0), {}, None),
        (Schedule("adaptive", 4.0, 1.0), {"release_below_share": 0.25}, None),
        (Schedule(), {}, None),
    ],
)
def test_a_run_without_a_hard_loss_keeps_its_soft_loss(
    schedule: Schedule, teacher: dict[str, Any], message: str | None
) -> None:
    distill = DistillConfig(hard_weight=0, soft_weight=schedule)
    config = RunConfig(teacher=TeacherConfig(**{"path": "a", **teacher}), distill=distill)
    if message is None:
        check_something_is_trained(config, 100)
    else:
        assert error_of(check_something_is_trained, config, 100).startswith(f"distill.hard_weight=0: {message}")
