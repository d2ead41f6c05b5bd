"""Step k trains at the rate that docs/learning_rate.md gives for k, from the first to the last and after resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from harness.runs import logged_rows
from harness.tiny import TinyRun

from dwt_ds.engine.learning_rate import LearningRate

PEAK = 0.5
WSD = "WarmupStableDecayLR"


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=PEAK, betas=(0.95, 0.999))


def rates(section: dict[str, Any], steps: int) -> list[float]:
    """Those that steps 1 to `steps` train at."""
    adamw = optimizer()
    schedule, found = LearningRate(adamw, section), []
    for _ in range(steps):
        found.append(adamw.param_groups[0]["lr"])
        schedule.step()
    return found


def warmup(name: str, warmup_steps: int, kind: str = "linear", **params: Any) -> dict[str, Any]:
    return {"type": name, "params": {"warmup_num_steps": warmup_steps, "warmup_type": kind, **params}}


CYCLE = {"cycle_min_lr": 0.1, "cycle_max_lr": PEAK, "cycle_first_step_size": 2, "cycle_second_step_size": 4}
# Schedule, and its rates by step as shares of the peak.
SCHEDULES = {
    "WarmupLR": (warmup("WarmupLR", 4), [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
    "log": (warmup("WarmupLR", 3, "log"), [0.5, math.log(3) / math.log(4), 1, 1]),
    "from above 0": (warmup("WarmupLR", 2, warmup_min_lr=0.1, warmup_max_lr=0.5), [0.6, 1, 1]),
    "no warm-up": (warmup("WarmupLR", 1, "log"), [1, 1]),
    "WarmupDecayLR": (
        warmup("WarmupDecayLR", 2, total_num_steps=6, warmup_max_lr=PEAK),
        [1 / 2, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0, 0],
    ),
    "two steps": (warmup("WarmupDecayLR", 1, total_num_steps=2, warmup_max_lr=PEAK), [1, 1 / 2]),
    "all warm-up": (warmup("WarmupDecayLR", 2, total_num_steps=2, warmup_max_lr=PEAK), [1 / 2, 1]),
    "one step": (warmup("WarmupDecayLR", 1, total_num_steps=1, warmup_max_lr=PEAK), [1, 0]),
    "a longer warm-up": (warmup("WarmupDecayLR", 3, total_num_steps=2, warmup_max_lr=PEAK), [1 / 3, 2 / 3, 1, 0]),
    "WarmupCosineLR": (
        warmup("WarmupCosineLR", 2, total_num_steps=5, warmup_min_ratio=0.2, cos_min_ratio=0.1),
        [0.6, 1, *(0.1 + 0.9 * (1 + math.cos(math.pi * done / 4)) / 2 for done in (1, 2, 3, 4)), 0.1],
    ),
    "LRRangeTest": (
        {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": PEAK, "lr_range_test_step_size": 2}},
        [1, 1.5, 2, 2.5],
    ),
    "stairs": (
        {
            "type": "LRRangeTest",
            "params": {
                "lr_range_test_min_lr": PEAK,
                "lr_range_test_step_size": 2,
                "lr_range_test_step_rate": 3.0,
                "lr_range_test_staircase": True,
            },
        },
        [1, 1, 4, 4, 7],
    ),
    "OneCycle": ({"type": "OneCycle", "params": CYCLE}, [0.2, 0.6, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
    WSD: (
        warmup(WSD, 2, total_num_steps=8, decay_num_steps=3),
        [1 / 2, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0],
    ),
    "1-sqrt": (
        warmup(WSD, 1, total_num_steps=6, decay_num_steps=3, decay_type="1-sqrt"),
        [1, 1, 1, 1 - math.sqrt(1 / 4), 1 - math.sqrt(2 / 4), 1 - math.sqrt(3 / 4), 0],
    ),
    "between ratios": (
        warmup(WSD, 2, total_num_steps=5, decay_num_steps=1, warmup_min_ratio=0.2, decay_min_ratio=0.1),
        [0.6, 1, 1, 1, 0.55, 0.1, 0.1],
    ),
    "a fifth": (warmup(WSD, 1, total_num_steps=5), [1, 1, 1, 1, 1 / 2]),
    "a share": (warmup(WSD, 1, total_num_steps=4, decay_ratio=0.5), [1, 1, 2 / 3, 1 / 3]),
    "less than a step": (warmup(WSD, 1, total_num_steps=4, decay_ratio=0.01), [1, 1, 1, 1 / 2]),
    "warm-up beyond the end": (warmup(WSD, 3, total_num_steps=2), [1 / 3, 2 / 3, 1, 0]),
    "all decay": (warmup(WSD, 2, total_num_steps=6, decay_ratio=1.0), [1 / 2, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0]),
    "no decay": (warmup(WSD, 2, total_num_steps=4, decay_num_steps=0), [1 / 2, 1, 1, 1]),
    "stable of one step": (warmup(WSD, 1, total_num_steps=1), [1, 0]),
}
DEEPSPEEDS = {name: section for name, (section, _) in SCHEDULES.items() if section["type"] != WSD}


@pytest.mark.parametrize(("section", "shares"), SCHEDULES.values(), ids=SCHEDULES)
def test_step_k_trains_at_the_rate_for_k(section: dict[str, Any], shares: list[float]) -> None:
    assert rates(section, len(shares)) == pytest.approx([PEAK * share for share in shares])


@pytest.mark.parametrize(("section", "shares"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_resume_continues_at_the_next_step(section: dict[str, Any], shares: list[float]) -> None:
    before = LearningRate(optimizer(), section)
    before.step()
    adamw = optimizer()
    after = LearningRate(adamw, section)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    adamw.param_groups[0]["lr"] = 123.0  # what loading the optimizer's own state may leave there
    after.set_rate()
    assert adamw.param_groups[0]["lr"] == pytest.approx(PEAK * shares[1])
    assert not after.two_steps_late


def test_one_cycle_begins_with_the_high_momentum() -> None:
    adamw = optimizer()
    schedule, momenta = LearningRate(adamw, {"type": "OneCycle", "params": CYCLE}), []
    for _ in range(4):
        momenta.append(adamw.param_groups[0]["betas"][0])
        schedule.step()
    assert momenta == pytest.approx([0.9, 0.85, 0.8, 0.825])


@pytest.mark.parametrize("section", DEEPSPEEDS.values(), ids=DEEPSPEEDS)
def test_a_run_of_a_version_before_keeps_its_timing(section: dict[str, Any]) -> None:
    """Its checkpoints hold the state of DeepSpeed's own class, which is the measure here."""
    theirs = optimizer()
    old = getattr(lr_schedules, section["type"])(theirs, **section["params"])
    for _ in range(2):
        old.step()
    ours = optimizer()
    schedule = LearningRate(ours, section)
    schedule.load_state_dict(old.state_dict())
    schedule.set_rate()
    for _ in range(5):
        assert schedule.two_steps_late
        for key in ("lr", "betas"):
            assert ours.param_groups[0][key] == theirs.param_groups[0][key]
        again = LearningRate(optimizer(), section)
        again.load_state_dict(schedule.state_dict())
        assert again.two_steps_late
        assert again.state_dict() == old.state_dict()
        schedule.step()
        old.step()


def test_a_run_of_a_version_before_is_on_time_once_it_has_a_schedule_that_was_not_there() -> None:
    adamw = optimizer()
    schedule = LearningRate(adamw, SCHEDULES[WSD][0])
    schedule.load_state_dict({"last_batch_iteration": 5})
    schedule.set_rate()
    assert adamw.param_groups[0]["lr"] == pytest.approx(PEAK * 2 / 4)
    assert not schedule.two_steps_late


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("LRRangeTest", "stairs")])
def test_the_share_of_the_highest_rate_is_that_of_the_step_that_comes(name: str) -> None:
    section, shares = SCHEDULES[name]
    schedule, found = LearningRate(optimizer(), section), []
    for _ in shares:
        found.append(schedule.share_of_highest())
        schedule.step()
    assert found == pytest.approx(shares)


def test_the_share_is_of_the_schedules_highest_rate_whatever_the_optimizers_are() -> None:
    two = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.4)], lr=1.0)
    schedule = LearningRate(two, warmup("WarmupLR", 4, warmup_max_lr=[2.0, 1.0]))
    assert schedule.share_of_highest() == 0.25
    scaling = LearningRate(two, warmup(WSD, 4, total_num_steps=9))
    assert [group["lr"] for group in two.param_groups] == pytest.approx([0.5 / 4, 0.25 / 4])
    assert scaling.share_of_highest() == 0.25
    falling = LearningRate(optimizer(), warmup("WarmupLR", 4, warmup_min_lr=0.9, warmup_max_lr=0.5))
    assert falling.share_of_highest() == 1.0


def test_a_checkpoint_of_a_version_before_at_step_0_starts_afresh() -> None:
    section = SCHEDULES["WarmupDecayLR"][0]
    schedule = LearningRate(optimizer(), section)
    schedule.load_state_dict({"last_batch_iteration": -1})
    assert not schedule.two_steps_late


def test_a_longer_run_takes_the_rates_of_its_length(tiny_run: TinyRun, tmp_path: Path) -> None:
    """And logs those that it trained at; the first step after the resume is one of them."""
    for steps in (2, 4):
        tiny_run(tmp_path, "train.warmup_ratio=0", "train.learning_rate=0.01", f"train.max_steps={steps}")
    found = [row["learning_rate"] for row in logged_rows(tmp_path).values()]
    assert found == pytest.approx([0.01, 0.005, 0.005, 0.0025])


def test_a_longer_run_decays_later_and_a_tied_weight_with_it(tiny_run: TinyRun, tmp_path: Path) -> None:
    """The weight is that of the step's rate as well, also in the first step after a resume."""
    settings = [f"deepspeed.scheduler.type={WSD}", "deepspeed.scheduler.params.decay_ratio=0.5"]
    settings += ["distill.soft_weight={schedule: learning_rate, start: 4, end: 1}"]
    settings += ["train.warmup_ratio=0", "train.learning_rate=0.01"]
    for steps in (2, 6):
        tiny_run(tmp_path, *settings, f"train.max_steps={steps}")
    shares = [1, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]
    found = [(row["learning_rate"], row["soft_weight"]) for row in logged_rows(tmp_path).values()]
    assert found == [pytest.approx((0.01 * share, 1 + 3 * share)) for share in shares]
