"""What a user reads of a mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dwt_ds.cli.main import main

Refusal = Callable[..., str]


def error_of(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """The message of the plain ValueError that the call raises: one line."""
    with pytest.raises(ValueError, match=".") as caught:
        function(*arguments, **keywords)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """`refusal(*arguments)`: the one-line error of a command that is refused."""

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(each) for each in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        return error

    return refused
