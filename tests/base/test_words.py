"""What people read: nearest names, errors on one line, shortened values, tables."""

from __future__ import annotations

import pytest

from dwt_ds.base.words import counted, nearest, one_line, prefix_errors, shorten, table


@pytest.mark.parametrize(
    ("word", "answer"),
    [("stpes", "; did you mean 'steps'?"), ("STEPS", "; did you mean 'steps'?"), ("adam", "; did you mean 'Adam'?")],
)
def test_the_nearest_name_is_suggested(word: str, answer: str) -> None:
    assert nearest(word, ["steps", "epochs", "Adam"]) == answer


def test_no_name_is_suggested_without_likeness() -> None:
    assert nearest("qqqq", ["steps", "epochs"]) == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\n  second\nthird"), "first second"),
        (ValueError("It ends here.\n"), "It ends here"),
        (ValueError("a" * 301), "a" * 297 + "..."),
        (OSError("\n  first  \n"), "first"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_an_error_on_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


def test_an_error_with_its_type() -> None:
    assert one_line(OSError("no such file"), with_type=True) == "OSError: no such file"
    assert one_line(OSError(), with_type=True) == "OSError"


def test_shorten_keeps_the_length() -> None:
    assert shorten("a" * 60) == "a" * 60
    assert shorten("a" * 61) == "a" * 57 + "..."
    assert shorten("abcdefgh", 6) == "abc..."


def test_a_table_aligns_its_columns() -> None:
    rows = [("run", "steps", "note"), ("long name", "1,000", ""), ("b", "10", "good"), ("total",)]
    assert table(rows, "<><") == [
        "run        steps  note",
        "long name  1,000",
        "b             10  good",
        "total",
    ]


def test_the_last_alignment_holds_for_the_columns_that_follow() -> None:
    assert table([("a", "bb", "cc"), ("aa", "b", "c")], "<>") == ["a   bb  cc", "aa   b   c"]
    assert table([("a", "bb", "c"), ("aa", "b", "c")]) == ["a   bb  c", "aa  b   c"]


def test_a_table_without_rows_has_no_lines() -> None:
    assert table([]) == []


@pytest.mark.parametrize("error", [ValueError("x is bad"), FileNotFoundError("x is bad")])
def test_an_error_gets_its_field_once(error: Exception) -> None:
    with pytest.raises(type(error), match="^teacher.path: x is bad$"), prefix_errors("teacher.path"):
        raise error
    with pytest.raises(type(error), match="^teacher.path='a': b$"), prefix_errors("teacher.path"):
        raise type(error)("teacher.path='a': b")


def test_one_of_something_is_singular() -> None:
    assert [counted(number, "rank") for number in (0, 1, 2, 1024)] == ["0 ranks", "1 rank", "2 ranks", "1,024 ranks"]
