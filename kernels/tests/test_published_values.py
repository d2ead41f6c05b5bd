"""Values that other projects hold their losses against, for ours.

torchtune's and NeMo Automodel's "KL" is the cross-entropy -sum p_t log p_s; the teacher's entropy less is the KL. Both
are computed here in Python's floats.
"""

from __future__ import annotations

import math

import pytest
import torch
from dwt_kernels import distill_loss


def softmax(logits: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(logit / temperature) for logit in logits]
    return [exponential / sum(exponentials) for exponential in exponentials]


def entropy(logits: list[float], temperature: float = 1.0) -> float:
    return -sum(p * math.log(p) for p in softmax(logits, temperature))


def cross_entropy(student: list[float], teacher: list[float], temperature: float) -> float:
    pairs = zip(softmax(teacher, temperature), softmax(student, temperature))
    return -sum(p_teacher * math.log(p_student) for p_teacher, p_student in pairs)


def test_torchtune_forward_kl(backend, device):
    """torchtune, tests/torchtune/modules/loss/test_kd_losses.py: 1.7209 in bf16, for these eight rows, to 1%."""
    student = [
        [1.125, -0.4102, -0.0879, -2.5],
        [0.2676, 0.3535, 0.8711, -1.4688],
        [-0.1084, 1.6641, 0.0084, 0.1196],
        [0.5, -0.6406, -0.2236, -1.5938],
        [-1.5312, -1.9219, 0.0, -0.5039],
        [-1.5391, 1.5312, 0.582, 0.2695],
        [-0.3887, 1.2188, 0.0, 0.6055],
        [0.5, 1.3828, 0.1309, -1.0312],
    ]
    teacher = [
        [-0.0381, -1.2578, -1.2031, 0.0947],
        [-0.7852, 0.4492, 1.5547, 0.0972],
        [0.8203, 0.0012, 0.7656, 0.3477],
        [-1.5781, 0.4297, 0.5977, 0.3926],
        [1.5156, 0.1641, 2.0781, -0.7734],
        [-0.5898, 0.4453, -0.7969, 0.6328],
        [0.6289, -0.8359, 0.9258, 0.2109],
        [0.0006, 0.5195, 3.2344, -1.5781],
    ]
    labels = torch.tensor([0, 3, 3, 1, 1, 1, 1, 1], device=device)
    tensors = (torch.tensor(logits, dtype=torch.bfloat16, device=device) for logits in (student, teacher))
    soft = distill_loss(*tensors, labels, backend=backend).soft.item()
    assert soft + sum(map(entropy, teacher)) / len(teacher) == pytest.approx(1.7209, rel=1e-2)


STUDENT = [[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]]
TEACHER = [[1.5, 0.0, -0.5], [0.2, -0.1, 0.0]]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nemo_kd_loss(backend, device, temperature):
    """NeMo Automodel, tests/unit_tests/loss/test_kd_loss.py: two rows of three, times tau^2, to 1e-6."""
    result = distill_loss(
        torch.tensor(STUDENT, device=device),
        torch.tensor(TEACHER, device=device),
        torch.tensor([0, 1], device=device),
        backend=backend,
        temperature=temperature,
        temperature_squared=True,
    )
    rows = [cross_entropy(*row, temperature) - entropy(row[1], temperature) for row in zip(STUDENT, TEACHER)]
    assert result.soft.item() == pytest.approx(temperature**2 * sum(rows) / 2, abs=1e-6)


def test_nemo_kd_loss_leaves_ignored_rows_out_and_divides_by_the_given_count(backend, device):
    """The same file: the labelled rows only; ten labels in the whole batch."""
    result = distill_loss(
        torch.tensor([*STUDENT, [9.0, 9.0, -9.0]], device=device),
        torch.tensor([*TEACHER, [0.0, 1.0, 2.0]], device=device),
        torch.tensor([0, 1, -100], device=device),
        backend=backend,
        normalizer=10,
    )
    rows = [cross_entropy(*row, 1.0) - entropy(row[1]) for row in zip(STUDENT, TEACHER)]
    hard = [-math.log(softmax(row, 1.0)[label]) for row, label in zip(STUDENT, (0, 1))]
    assert result.soft.item() == pytest.approx(sum(rows) / 10, abs=1e-6)
    assert result.hard.item() == pytest.approx(sum(hard) / 10, abs=1e-6)


def test_two_classes_by_hand(backend, device):
    """Even odds against 9 to 1: KL = 0.9 ln 1.8 + 0.1 ln 0.2, cross-entropy ln 2, gradient (0.5 - 0.9) + (0.5 - 1)."""
    student = torch.zeros(1, 2, device=device, requires_grad=True)
    teacher = torch.tensor([[math.log(9.0), 0.0]], device=device)
    result = distill_loss(student, teacher, torch.tensor([0], device=device), backend=backend)
    result.loss.backward()
    assert result.soft.item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6)
    assert result.hard.item() == pytest.approx(math.log(2), abs=1e-6)
    assert student.grad.tolist()[0] == pytest.approx([-0.9, 0.9], abs=1e-6)
