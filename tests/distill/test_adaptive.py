from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.errors import error_of
from harness.ranks import Train
from harness.runs import assert_same_run, back_to, completed, logged_rows, rows_of
from transformers import AutoModelForMaskedLM, AutoTokenizer

from dwt_ds.base.files import read_manifest
from dwt_ds.config.objective import DistillConfig, Schedule
from dwt_ds.config.schema import RunConfig
from dwt_ds.distill.adaptive import AdaptiveWeight, check_measured

CPU = torch.device("cpu")


def weight_after(losses: list[tuple[float, float]], teacher_loss: float = 5.0, **fields: Any) -> float:
    it = AdaptiveWeight(Schedule("adaptive", **fields), teacher_loss, CPU)
    for hard, soft in losses:
        it.observe(torch.tensor(hard), torch.tensor(soft))
    return float(it.value())


@pytest.mark.parametrize("signal", ["gap", "projection"])
def test_it_is_the_start_until_something_was_observed(signal: str) -> None:
    assert weight_after([], start=4.0, end=1.0, signal=signal) == 4.0


@pytest.mark.parametrize(
    ("hard", "weight"),
    # teacher 5.0, width 0.5
    [(9.0, 4.0), (5.5, 4.0), (5.25, 2.5), (5.0, 1.0), (4.0, 1.0)],
)
def test_the_gap_moves_it_from_start_to_end(hard: float, weight: float) -> None:
    assert weight_after([(hard, 0.7)], start=4.0, end=1.0, signal="gap", width=0.5) == pytest.approx(weight)


@pytest.mark.parametrize(
    ("hard", "weight"),
    # teacher 5.0; student and teacher differ by 0.4
    [(5.4, 4.0), (5.2, 3.0), (5.0, 2.0), (4.8, 1.0), (4.6, 0.0), (3.0, 0.0), (9.0, 4.0)],
)
def test_the_projection_is_half_way_when_both_are_equally_good(hard: float, weight: float) -> None:
    assert weight_after([(hard, 0.4)], start=4.0, signal="projection") == pytest.approx(weight, abs=1e-4)


def test_a_student_that_is_the_teacher_has_a_finite_weight() -> None:
    assert weight_after([(5.0, 0.0)], start=2.0, signal="projection") == 2.0


def test_a_raised_temperature_is_counted_out() -> None:
    schedule = Schedule("adaptive", signal="projection")
    plain, hot = AdaptiveWeight(schedule, 5.0, CPU), AdaptiveWeight(schedule, 5.0, CPU)
    plain.observe(torch.tensor(5.2), torch.tensor(0.8))
    hot.observe(torch.tensor(5.2), torch.tensor(0.2), temperature=2.0)
    assert float(plain.value()) == pytest.approx(float(hot.value()))


def test_the_average_forgets() -> None:
    fields: dict[str, Any] = {"start": 1.0, "signal": "gap", "width": 1.0, "average_steps": 10}
    assert weight_after([(6.0, 1.0)] * 50, **fields) == pytest.approx(1.0)
    half = weight_after([(6.0, 1.0)] * 50 + [(5.0, 1.0)] * 7, **fields)
    assert half == pytest.approx(0.9**7, abs=0.01)
    assert weight_after([(6.0, 1.0)] * 50 + [(5.0, 1.0)] * 200, **fields) == pytest.approx(0.0, abs=1e-5)


def test_a_step_that_overflowed_is_passed_over() -> None:
    bad = [(float("inf"), float("nan")), (float("nan"), 0.3), (5.3, float("inf"))]
    assert weight_after([(5.2, 0.4), *bad, (5.1, 0.4)]) == weight_after([(5.2, 0.4), (5.1, 0.4)])


def test_its_state_comes_back_to_the_bit() -> None:
    torch.manual_seed(0)
    schedule = Schedule("adaptive", start=3.0)
    it = AdaptiveWeight(schedule, 5.123456789, CPU)
    for hard, soft in 5.1 + 0.2 * torch.rand(20, 2):
        it.observe(hard, soft)
    state = json.loads(json.dumps(it.state_dict()))
    assert all(isinstance(value, float) for value in state.values())
    again = AdaptiveWeight(schedule, 1.0, CPU)
    again.load_state_dict(state)
    for hard, soft in 5.1 + 0.2 * torch.rand(20, 2):
        for each in (it, again):
            each.observe(hard, soft)
        assert again.value().equal(it.value())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": Schedule("adaptive")}, "temperature.schedule='adaptive'"),
        ({"temperature": Schedule("learning_rate")}, "temperature.schedule='learning_rate'"),
        ({"soft_weight": Schedule("adaptive", start=1.0, end=2.0)}, "soft_weight.start=1.0 is below its end"),
    ],
)
def test_mistakes_are_reported(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**settings)


# The ranks have different numbers of labels.
ADAPTIVE = [
    "data.label_draw=bernoulli",
    "teacher.dtype=bf16",
    "train.max_steps=16",
    "train.checkpoint_every=5",
    "train.export_every=6",
    "distill.soft_positions=0.3",
    "distill.soft_weight={schedule: adaptive, start: 4, end: 0.5, average_steps: 4}",
]


@pytest.fixture
def teacher_of_frequencies(tiny_teacher: Path, tiny_text: Path, tmp_path: Path) -> Path:
    """Predicts every word by how often it comes, whatever stands around it; a student needs a while to know as much."""
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    counts = torch.bincount(torch.tensor(tokenizer(tiny_text.read_text())["input_ids"]), minlength=len(tokenizer))
    with torch.no_grad():
        model.cls.predictions.transform.LayerNorm.weight.zero_()
        model.cls.predictions.transform.LayerNorm.bias.zero_()
        model.cls.predictions.bias.copy_((counts + 0.1).log())
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def weights_by_hand(run: Path) -> list[float]:
    """After each step of `run`, by the projection, from what it logged of its labelled tokens."""
    rows = rows_of(run)
    newest = max((run / "checkpoints").glob("step_*"))
    teacher_loss = read_manifest(newest)["state"]["teacher_loss"]
    hard = soft = 0.0
    weights = []
    for count, row in enumerate((row for row in rows if "loss" in row), start=1):
        assert row["labelled_soft_loss"] != row["soft_loss"]
        hard += (row["hard_loss"] - hard) / min(count, 4)
        soft += (row["labelled_soft_loss"] - soft) / min(count, 4)
        weights.append(0.5 + 3.5 * (0.5 + (hard - teacher_loss) / (2 * soft)))
    return weights


def test_all_ranks_have_it_a_run_logs_it_and_a_resume_continues_exactly(
    train: Train,
    watch: Callable[..., Any],
    tiny_recipe: Path,
    teacher_of_frequencies: Path,
    tmp_path: Path,
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    settings = [str(tiny_recipe), f"teacher.path={teacher_of_frequencies}", *ADAPTIVE]
    code, output, notes = watch([*settings, f"output_dir={straight}"])
    assert code == 0, output
    weights = [row["soft_weight"] for row in logged_rows(straight).values()]
    assert [rank["soft_weights"] for rank in notes] == [weights, weights]
    assert [rank["teacher"] for rank in notes] == ["torch.bfloat16"] * 2
    assert weights[0] == 4.0
    assert all(0.5 < weight < 4.0 for weight in weights[1:])
    assert len(set(weights)) == 16  # it moves at every step
    assert weights[1:] == pytest.approx(weights_by_hand(straight)[:-1], rel=1e-5)
    exports = sorted(path.name for path in (straight / "export").glob("step_*"))
    assert exports == ["step_00000006", "step_00000012"]
    assert (straight / "export" / "step_00000006" / "model.safetensors").is_file()
    assert (straight / "export" / "model.safetensors").is_file()

    back_to(15, straight, resumed)
    assert "resuming from" in completed(train(2, [*settings, f"output_dir={resumed}"]))
    assert_same_run(resumed, straight)


def test_a_teacher_without_a_held_out_loss_is_refused() -> None:
    config = RunConfig(distill=DistillConfig(soft_weight=Schedule("adaptive", 4.0)))
    check_measured(config, 3.0)
    check_measured(RunConfig(), None)
    assert "='adaptive': the teacher's loss cannot be measured" in error_of(check_measured, config, None)
