from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwt_ds.config.objective import Schedule
from dwt_ds.distill.schedules import value_at

MOVING = ["linear", "cosine", "exponential", "step"]
VALUES = st.floats(min_value=1e-3, max_value=1e3)


@pytest.mark.parametrize(
    ("schedule", "quarter", "middle"),
    [
        ("constant", 4.0, 4.0),
        ("linear", 3.25, 2.5),
        ("cosine", 1 + 3 * 0.5 * (1 + math.cos(math.pi / 4)), 2.5),
        ("exponential", 4**0.75, 2.0),
        ("step", 4.0, 4.0),
    ],
)
def test_from_start_to_end_over_all_steps(schedule: str, quarter: float, middle: float) -> None:
    end = None if schedule == "constant" else 1.0
    final = 4.0 if schedule == "constant" else 1.0
    it = Schedule(schedule, 4.0, end)
    values = [value_at(it, step, 100) for step in (0, 25, 50, 100, 101, 1000)]
    assert values == pytest.approx([4.0, quarter, middle, final, final, final], rel=1e-12)


@pytest.mark.parametrize("schedule", MOVING)
def test_a_span_is_a_share_of_the_training_and_the_end_stays_after_it(schedule: str) -> None:
    it = Schedule(schedule, 4.0, 1.0, span=0.25)
    assert value_at(it, 24, 100) > 1.0
    assert [value_at(it, step, 100) for step in (25, 26, 99)] == [1.0, 1.0, 1.0]
    # The share is of however many steps there are.
    assert value_at(it, 24, 1000) > 1.0
    assert value_at(it, 250, 1000) == 1.0


@pytest.mark.parametrize("schedule", MOVING)
def test_a_span_in_steps_takes_the_place_of_the_share(schedule: str) -> None:
    it = Schedule(schedule, 4.0, 1.0, span=0.01, span_steps=50)
    assert value_at(it, 49, 100) > 1.0
    assert value_at(it, 50, 100) == 1.0
    assert value_at(it, 49, 10_000) == value_at(it, 49, 100)


def test_a_step_holds_the_start_until_its_span_is_over() -> None:
    it = Schedule("step", 4.0, 1.0, span_steps=3)
    assert [value_at(it, step, 10) for step in range(5)] == [4.0, 4.0, 4.0, 1.0, 1.0]


def test_a_linear_one_falls_by_the_same_amount_and_an_exponential_one_by_the_same_factor() -> None:
    linear = [value_at(Schedule("linear", 5.0, 1.0), step, 4) for step in range(5)]
    assert linear == [5.0, 4.0, 3.0, 2.0, 1.0]
    exponential = [value_at(Schedule("exponential", 16.0, 1.0), step, 4) for step in range(5)]
    assert exponential == pytest.approx([16.0, 8.0, 4.0, 2.0, 1.0], rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "step"])
def test_zero_is_a_possible_end(schedule: str) -> None:
    assert value_at(Schedule(schedule, 1.0, 0.0), 10, 10) == 0.0


@pytest.mark.parametrize(("end", "values"), [(None, [0.4, 4.0, 2.0, 0.0]), (1.0, [1.3, 4.0, 2.5, 1.0])])
def test_a_weight_in_proportion_to_the_learning_rate(end: float | None, values: list[float]) -> None:
    it = Schedule("learning_rate", 4.0, end)
    assert [value_at(it, 7, 10, share) for share in (0.1, 1.0, 0.5, 0.0)] == pytest.approx(values)


def test_a_run_of_one_step_starts_at_the_start() -> None:
    assert value_at(Schedule("linear", 4.0, 1.0, span=0.1), 0, 1) == 4.0


@given(
    schedule=st.sampled_from(MOVING),
    start=VALUES,
    end=VALUES,
    total_steps=st.integers(min_value=1, max_value=500),
    span=st.floats(min_value=0.01, max_value=1.0),
    span_steps=st.none() | st.integers(min_value=1, max_value=700),
)
def test_the_way_is_monotone_and_never_leaves_start_and_end(
    schedule: str, start: float, end: float, total_steps: int, span: float, span_steps: int | None
) -> None:
    it = Schedule(schedule, start, end, span, span_steps)
    values = [value_at(it, step, total_steps) for step in range(total_steps + 2)]
    rounding = 1e-12 * max(start, end)
    assert values[0] == pytest.approx(start, rel=1e-12)
    assert all(min(start, end) - rounding <= value <= max(start, end) + rounding for value in values)
    sign = 1.0 if end >= start else -1.0
    assert all(sign * (after - before) >= -rounding for before, after in zip(values, values[1:]))
    if span_steps is None or span_steps <= total_steps:
        assert values[total_steps] == end
