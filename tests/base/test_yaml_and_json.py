"""YAML and JSON as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from harness.errors import error_of

from dwt_ds.base.yaml_and_json import as_number, parse_json, parse_yaml, yaml_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-8", 1e-8),
        ("1.0e0", 1.0),
        ("2.5e8", 2.5e8),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("010", 10),
        ("0x10", 16),
        ("1.5.2", "1.5.2"),
        ("1:30", "1:30"),  # sixty-based in YAML 1.1
        ("2024-13-45", "2024-13-45"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-8'", "1e-8"),
        ("e8", "e8"),
        ("true", True),
        ("off", False),
        ("~", None),
        ("[1e3, x]", [1000.0, "x"]),
        ("{on: 1, 2: 3, null: 4}", {"on": 1, "2": 3, "null": 4}),
        ("a: &a {b: 1}\nc: {<<: *a, d: *a}", {"a": {"b": 1}, "c": {"b": 1, "d": {"b": 1}}}),
    ],
)
def test_yaml_means_what_is_written(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "duplicate key 'a'"),
        ("x: {a: 1, 'a': 3}", "duplicate key 'a'"),
        ("a: &a {b: *a}", "*a stands within &a"),
        ("a: &a [1, [*a]]", "*a stands within &a"),
        ("? [1]\n: 2", "a key must be text"),
        ("!!float x", "could not convert string to float"),
        ("a: *b", "found undefined alias"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_wrong_with_yaml_is_one_line(text: str, message: str) -> None:
    assert message in error_of(parse_yaml, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"b": 1, "b": 2}}', "'b' is a duplicate key; remove one"),
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ('{"a": -Infinity}', "-Infinity is not a number of JSON"),
        ("{", "not valid JSON: "),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_with_json_is_one_line(text: str, message: str) -> None:
    assert error_of(parse_json, text).startswith(message)


def test_what_is_written_is_read_again() -> None:
    shared = ["2024-01-01", "1e5", "010", "on", "", " x", "1:30", "true", "~", "é"]
    values = {"text": shared, "on": shared, "numbers": [1e-8, 2.5e8, 10, -0.5, 1e16], "others": [True, None, {}, []]}
    assert parse_yaml(yaml_text(values)) == values


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-8", 1e-8), ("64", 64), ("-2.", -2.0), ("x", None), ("", None), ("1_000", None), ("nan", None), ("inf", None)],
)
def test_a_number_in_text(text: str, value: float | None) -> None:
    assert as_number(text) == value
