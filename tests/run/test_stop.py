"""Which processes above a rank are watched as its launchers, and requests while ranks wait for one another."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.ranks import Start

from dwt_ds.base.processes import own_command
from dwt_ds.engine import ranks
from dwt_ds.run.stop import STOP_FILE, StopRequest
from dwt_ds.run.stop_agreement import StopAgreement

RANK = "from dwt_ds.run.stop import _launchers_above; print(len(_launchers_above()))"


@pytest.mark.parametrize(
    ("command", "launchers"),
    [
        ("deepspeed", 1),
        ("deepspeed.launcher.runner", 1),
        ("deepspeed.launcher.launch", 1),
        ("dwt-ds launch", 1),
        (" ".join(own_command("launch")[2:]), 1),
        ("dwt-ds study", 0),
        ("another launch", 0),
    ],
)
def test_launchers_are_known_by_their_names(command: str, launchers: int, tmp_path: Path) -> None:
    name, *words = command.split()
    (tmp_path / name).write_text(f"{sys.executable} -c '{RANK}'\nexit 0\n", encoding="utf-8")
    done = subprocess.run(["sh", str(tmp_path / name), *words], capture_output=True, text=True)
    assert done.stdout == f"{launchers}\n", done.stderr


def test_the_folder_is_looked_at_once_a_second_and_a_signal_counts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on another machine, and each step would wait for that."""
    now, looks, is_ours = [100.0], [], StopRequest._is_ours

    def look(self: StopRequest, file: Path) -> bool:
        looks.append(now[0])
        return is_ours(self, file)

    monkeypatch.setattr(StopRequest, "_is_ours", look)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    signalled, asked = StopRequest(), StopAgreement(StopRequest(), tmp_path)
    by_signal = StopAgreement(signalled, tmp_path / "other")
    assert not any(asked.is_asked() for _ in range(3))
    assert not by_signal.is_asked()
    signalled.ask("SIGTERM")
    assert by_signal.is_asked()
    (tmp_path / STOP_FILE).touch()
    os.utime(tmp_path / STOP_FILE, (time.time() + 1, time.time() + 1))  # the kernel's clock for files may lag a little
    now[0] = 100.9
    assert not asked.is_asked()
    now[0] = 101.0
    assert asked.is_asked()
    now[0] = 101.1
    assert asked.is_asked()
    assert looks == [100.0, 100.0, 101.0], "once a second for each"
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert not StopAgreement(StopRequest(), tmp_path).is_asked(), "rank 0 looks for all"


def test_the_reasons_are_those_of_the_ranks_that_were_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "gather_from_ranks", lambda reason: [reason, "SIGTERM", "SIGINT", "SIGTERM"])
    assert StopAgreement(StopRequest(), tmp_path).reasons() == "SIGINT, SIGTERM"


def test_a_request_that_names_its_launch_counts_whatever_the_clocks_say(tmp_path: Path) -> None:
    """The launch may be on another host; or the clock was set back since the ranks began."""
    (tmp_path / STOP_FILE).write_text("ours")
    os.utime(tmp_path / STOP_FILE, (1e9, 1e9))
    assert StopRequest("ours").is_asked(tmp_path)
    assert not StopRequest("another").is_asked(tmp_path)
    assert not StopRequest().is_asked(tmp_path)
    (tmp_path / STOP_FILE).write_text("")
    os.utime(tmp_path / STOP_FILE, (1e9, 1e9))
    assert not StopRequest("ours").is_asked(tmp_path), "left behind by a launch on a full disk"


IN_A_MOMENT = """
import sys
from dwt_ds.run import stop
from dwt_ds.pretrain import main
stop._MEETING_SECONDS, stop._RANK_0_SECONDS = 1.0, 1.0
sys.exit(main())
"""


@pytest.mark.slow
def test_ranks_that_wait_for_one_that_never_comes_end_when_asked(
    start_ranks: Start, tiny_recipe: Path, tmp_path: Path
) -> None:
    """By a request to their own launch; one to another launch in the same folder is not theirs."""
    words = ["-c", IN_A_MOMENT, str(tiny_recipe), f"output_dir={tmp_path}", "--launched_as=ours"]
    started = start_ranks([words, words, ["-c", "import time; time.sleep(600)"]])
    waiting, absent = started.processes[:2], started.processes[2]
    for request, seconds in (("another", 4.0), ("ours", 60.0)):
        (tmp_path / STOP_FILE).write_text(request)
        give_up = time.monotonic() + seconds
        while any(rank.is_alive() for rank in waiting) and time.monotonic() < give_up:
            time.sleep(0.2)
        if request == "another":
            assert all(rank.is_alive() for rank in waiting), started.output()
    assert [rank.exitcode for rank in waiting] == [0, 0], started.output()
    assert "Traceback" not in started.output()
    assert absent.is_alive()
