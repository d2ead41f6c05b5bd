"""When the student's passes are recorded and replayed; on a CPU by a stand-in that repeats them, see test_gpu.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.replaying_pretrain import Repeater, Repetition
from harness.runs import values_of
from harness.tiny import TinyRun
from torch import nn

from dwt_ds.data.batches import Batch
from dwt_ds.distill.objective import Losses, LossScalars
from dwt_ds.engine.cuda_graphs import EAGER_CALLS, MOST_SHAPES
from dwt_ds.engine.training_graphs import GraphedTraining

REPLAYING = str(Path(__file__).parent / "replaying_pretrain.py")
LOSSES = ("loss", "hard_loss", "soft_loss", "grad_norm", "eval_hard_loss")
COMMON = ["train.max_steps=8", "train.eval_every=3", "train.gradient_accumulation_steps=2", "student.dropout=0.1"]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        pytest.param(1, [], marks=pytest.mark.slow, id="one rank"),
        pytest.param(2, ["deepspeed_config=zero2_bf16"], id="two ranks in bf16"),
        pytest.param(1, ["distill.soft_positions=0.3", "teacher.release=auto"], id="further positions"),
    ],
)
def test_a_run_that_replays_its_passes_is_the_run(
    ranks: int, settings: list[str], tiny_run: TinyRun, tmp_path: Path
) -> None:
    """Losses, norms and dropout, with evaluations in between, to the last bit."""
    runs = {}
    for mode in ("off", "auto"):
        arguments = [*COMMON, *settings, f"train.cuda_graphs={mode}"]
        output = tiny_run(tmp_path / mode, *arguments, ranks=ranks, program=[REPLAYING])
        runs[mode] = values_of(tmp_path / mode, *LOSSES)
        replays = json.loads(re.findall(r"replays (\[.*\])", output)[-1])
        assert (max(replays, default=0) > 8) == (mode == "auto"), output
    assert runs["auto"] == runs["off"]


@pytest.mark.parametrize("settings", [[], ["teacher.sharded=true"]], ids=["whole", "sharded"])
def test_replays_go_on_after_the_release_of_the_teacher_and_hold_nothing_of_it(
    settings: list[str], tiny_run: TinyRun, tmp_path: Path
) -> None:
    """Else its head, and the memory of the passes recorded with it, would stay on the device."""
    runs = {}
    for mode in ("off", "auto"):
        arguments = [*COMMON, "train.max_steps=12", *settings, f"train.cuda_graphs={mode}"]
        arguments += ["distill.soft_weight={schedule: linear, start: 4, end: 0, span: 0.5}", "teacher.release=auto"]
        output = tiny_run(tmp_path / mode, *arguments, program=[REPLAYING])
        assert "step 6/12  teacher released" in output
        assert re.findall("release: (.*)", output) == ["0 passes and views, 0 tensors of the head"]
        runs[mode] = values_of(tmp_path / mode, *LOSSES)
    with_teacher_and_alone = json.loads(re.findall(r"replays (\[.*\])", output)[-1])[-4:]
    assert min(with_teacher_and_alone) > 4, output
    assert runs["auto"] == runs["off"]


class Objective(nn.Module):
    """Its gradient is twice the weight at each label, times the soft weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 21.0))

    def forward(self, batch: Batch, teacher: None, scalars: LossScalars) -> Losses:
        loss = self.weight[batch.labels].square().sum() * scalars.soft_weight
        return Losses(loss, loss.detach(), loss.detach())


class Repeats(Repeater):
    without_backward = False
    """Whether a recorded backward pass computes nothing."""

    def record(self, forward: Callable[[], Any]) -> Repetition:
        is_backward = len(self.replays) % 2 == 1
        return super().record((lambda: None) if is_backward and self.without_backward else forward)


class Passes:
    """Training passes of `Objective` that may be recorded; each gradient is compared with the one by hand."""

    def __init__(self, recorder: Repeats) -> None:
        self.objective, self.recorder, self.loss_scale = Objective(), recorder, 1.0
        recorder.replays = []
        self.gradient = self.objective.weight.grad = torch.zeros(20)
        parts: Any = {"parameters": [self.objective.weight], "views": [self.gradient], "buffers": [self.gradient]}
        GraphedTraining(self.objective, SimpleNamespace(**parts), recorder, lambda: self.loss_scale)  # type: ignore[arg-type]

    def call(self, labels: int, *, soft_weight: float = 1.0) -> None:
        chosen, one = torch.arange(labels), torch.ones(())
        batch = Batch(chosen[None], None, chosen, chosen, labels, torch.zeros(1))
        self.gradient.zero_()
        scalars = LossScalars(torch.tensor(soft_weight), one, one, one, one)
        self.objective(batch, None, scalars).loss.backward()
        expected = torch.zeros(20)
        expected[:labels] = 2 * soft_weight * self.objective.weight.detach()[:labels]
        assert torch.equal(self.gradient, expected)

    def replays(self) -> list[int]:
        """Of each recording; a pass has two, and is replayed once to compare it."""
        return self.recorder.replays


@pytest.mark.parametrize("bad", ["loss scale", "loss"])
def test_a_gradient_that_is_not_finite_is_no_reason_to_give_the_graphs_up(bad: str) -> None:
    passes = Passes(Repeats())
    for _ in range(EAGER_CALLS):
        passes.call(5)
    passes.loss_scale = float("inf") if bad == "loss scale" else 1.0
    passes.call(5, soft_weight=float("inf") if bad == "loss" else 1.0)
    passes.loss_scale = 1.0
    for _ in range(EAGER_CALLS):
        passes.call(5)
    assert passes.replays() == []
    for _ in range(3):
        passes.call(5)
    assert passes.replays() == [4, 4]


@pytest.mark.parametrize("why", ["not finite", "too far off"])
def test_shapes_that_are_not_replayed_leave_room_for_others(why: str) -> None:
    passes = Passes(Repeats())
    for labels in range(1, MOST_SHAPES + 1):
        for _ in range(EAGER_CALLS):
            passes.call(labels)
        passes.loss_scale = float("inf") if why == "not finite" else 1.0
        passes.recorder.without_backward = why == "too far off"
        passes.call(labels)
    passes.loss_scale, passes.recorder.without_backward = 1.0, False
    for _ in range(EAGER_CALLS + 3):
        passes.call(9)
    assert passes.replays()[-2:] == [4, 4]
