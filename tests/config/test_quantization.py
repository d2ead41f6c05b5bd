"""The settings of quantization-aware training."""

from __future__ import annotations

from typing import Any

import pytest
from harness.errors import error_of

from dwt_ds.config.quantization import Quantization, check_start_step, parse_quantization


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("none", None),
        ("w8a8", Quantization(8, 8)),
        ("w4a8", Quantization(4, 8)),
        ({}, Quantization()),
        (
            {"weight_bits": 3, "activation_bits": None, "modules": ["head"], "start_step": 7, "group_size": 16},
            Quantization(3, None, ("head",), 7, 16),
        ),
    ],
)
def test_settings_are_parsed_and_come_back(value: Any, expected: Quantization | None) -> None:
    assert parse_quantization(value) == expected
    if expected is not None:
        assert parse_quantization(expected.to_dict()) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("w8a9", "student.quantization='w8a9': unknown; did you mean 'w8a8'?"),
        ("int", "student.quantization='int': unknown; use none, w8a8, w4a8 or a mapping with weight_bits"),
        (8, "student.quantization=8: must be a mapping of settings"),
        ({"weight_bit": 8}, "student.quantization.weight_bit: unknown key; did you mean 'weight_bits'?"),
        ({"weight_bits": 1}, "student.quantization.weight_bits=1: must be at least 2"),
        ({"weight_bits": 9}, "student.quantization.weight_bits=9: must be at most 8"),
        ({"weight_bits": None}, "student.quantization.weight_bits=None: must be a whole number"),
        ({"weight_bits": True}, "student.quantization.weight_bits=True: must be a number"),
        ({"start_step": True}, "student.quantization.start_step=True: must be a number"),
        ({"activation_bits": 16}, "student.quantization.activation_bits=16: must be at most 8"),
        ({"start_step": -1}, "student.quantization.start_step=-1: must be at least 0"),
        ({"start_step": 1.5}, "student.quantization.start_step=1.5: must be a whole number"),
        ({"group_size": 1}, "student.quantization.group_size=1: must be at least 2"),
        ({"modules": []}, "student.quantization.modules=[]: must be a list of at least 1"),
        ({"modules": "encoder"}, "student.quantization.modules='encoder': must be a list"),
        (
            {"modules": ["encodr"]},
            "student.quantization.modules='encodr': must be 'encoder', 'embeddings' or 'head'",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_line(value: Any, message: str) -> None:
    assert error_of(parse_quantization, value) == message


def test_a_run_that_ends_before_the_start_step_is_refused() -> None:
    check_start_step(Quantization(start_step=9), total_steps=10)
    with pytest.raises(ValueError, match="student.quantization.start_step=10: the run has 10 steps"):
        check_start_step(Quantization(start_step=10), total_steps=10)


def test_settings_are_described_in_one_line() -> None:
    assert Quantization(4, None, group_size=32, start_step=5).describe() == (
        "4-bit weights (a scale for each 32 inputs), unrounded activations, encoder, from step 5"
    )
