"""Commands of the doctor end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dwt_ds.doctor import commands


@pytest.fixture
def ends_on_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(commands, "_ending", threading.Event())
    commands.end_commands_on_signals()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("ends_on_signals")
def test_a_command_that_is_starting_when_the_signal_comes_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def signal_before_it_returns(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        process = start(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return process

    monkeypatch.setattr(commands.subprocess, "Popen", signal_before_it_returns)
    ended: list[tuple[int, str, str]] = []
    over = threading.Event()

    def run() -> None:
        ended.append(commands.run(["sleep", "30"], 60))
        over.set()

    threading.Thread(target=run, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        over.wait()
    assert stop.value.code == 128 + signal.SIGTERM
    over.wait(20)
    assert ended == [(-signal.SIGTERM, "", "")]


def test_a_command_that_does_not_end_on_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_GRACE_SECONDS", 0.2)
    endless = ["bash", "-c", "trap '' TERM; echo begun; sleep 1000 & wait; wait"]
    assert commands.run(endless, 0.5) == (124, "begun\n", "no answer within 0 s")
