"""Logged commands, and the signals that end them."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest

from dwt_ds.launch import commands


def test_a_logged_command_is_asked_to_stop_and_its_end_is_waited_for(tmp_path: Path) -> None:
    log, stop = tmp_path / "logs" / "log", threading.Event()
    assert commands.run_logged(["sh", "-c", "echo said; echo more >&2; exit 7"], log, stop) == 7
    slowly_ends = "trap 'sleep 0.2; echo saved; exit 9' TERM; touch ready; for i in $(seq 200); do sleep 0.05; done"

    def ask() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        stop.set()

    asker = threading.Thread(target=ask)
    asker.start()
    assert commands.run_logged(["sh", "-c", f"cd {shlex.quote(str(tmp_path))}; {slowly_ends}"], log, stop) == 9
    asker.join()
    assert log.read_text() == "said\nmore\nsaved\n"


@pytest.mark.usefixtures("hears_hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_set_the_event_while_the_block_runs(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with commands.stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(10)
    assert signal.getsignal(number) is former
