"""Flattening, merging and comparing nested settings."""

from __future__ import annotations

from typing import Any

import pytest

from dwt_ds.base.trees import NOT_SET, Difference, differences, flatten, get_place, merge, set_place


def test_flatten_names_every_leaf() -> None:
    tree = {"seed": 1, "train": {"betas": [0.9, 0.99], "log": {"every": 2}}, "sources": [{"path": "a"}, {"path": "b"}]}
    assert flatten(tree) == {
        "seed": 1,
        "train.betas": [0.9, 0.99],
        "train.log.every": 2,
        "sources[0].path": "a",
        "sources[1].path": "b",
    }


def test_flatten_keeps_empty_mappings_and_lists() -> None:
    assert flatten({"config": {}, "sources": [], 1: None}) == {"config": {}, "sources": [], "1": None}


def test_a_value_is_put_where_it_is_found() -> None:
    tree: dict[str, Any] = {"a": 1, "b": {"null": None}}
    set_place(tree, "b.c.d", 2)
    set_place(tree, "a", 3)
    assert tree == {"a": 3, "b": {"null": None, "c": {"d": 2}}}
    assert (get_place(tree, "b.c.d"), get_place(tree, "b.c"), get_place(tree, "a")) == (2, {"d": 2}, 3)
    assert [get_place(tree, place, NOT_SET) for place in ("b.null", "b.e", "a.e")] == [None, NOT_SET, NOT_SET]
    assert get_place(tree, "b.e") is None


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}}, {"a": 1, "b": {"c": 4, "d": 3}}),
        ({"a": 1}, {"a": {"b": 2}}, {"a": {"b": 2}}),
        ({"a": {"b": 2}}, {"a": 1}, {"a": 1}),
        ({"a": {"b": 2}}, {"a": None}, {"a": None}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
    ],
)
def test_merge(below: dict[str, Any], above: dict[str, Any], merged: dict[str, Any]) -> None:
    assert merge(below, above) == merged


def test_merge_shares_no_mapping_with_its_arguments() -> None:
    shared: dict[str, Any] = {"x": {"y": 1}}
    merged = merge({"a": shared}, {"b": shared})
    merged["a"]["x"]["y"] = 2
    merged["b"]["x"]["y"] = 3
    assert shared == {"x": {"y": 1}}
    assert merged["a"]["x"]["y"] == 2


def test_differences_are_in_the_order_of_the_second_tree() -> None:
    before = {"gone": 5, "a": 1, "b": {"same": 2, "c": 3}}
    now = {"b": {"same": 2, "c": 4}, "a": 0, "new": 6}
    assert differences(before, now) == [
        Difference("b.c", 3, 4),
        Difference("a", 1, 0),
        Difference("new", NOT_SET, 6),
        Difference("gone", 5, NOT_SET),
    ]
    assert str(NOT_SET) == "(not set)"


def test_none_is_as_good_as_not_set() -> None:
    assert differences({"a": None}, {}) == differences({}, {"a": None}) == []


def test_lists_of_mappings_differ_entry_by_entry() -> None:
    before = {"sources": [{"path": "a", "rows": 1}]}
    now = {"sources": [{"path": "a", "rows": 2}, {"path": "b"}]}
    assert differences(before, now) == [
        Difference("sources[0].rows", 1, 2),
        Difference("sources[1].path", NOT_SET, "b"),
    ]
