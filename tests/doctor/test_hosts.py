from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from dwt_ds.doctor import hosts
from dwt_ds.launch.hostfile import Host
from dwt_ds.launch.local import Launch

MODULE = "dwt_ds.engine.collective_check"
LAUNCH = Launch([Host("a", 2)], "a", "pdsh", ["--hostfile", "hosts"], {"MASTER_PORT": "29511"})


@pytest.mark.parametrize(
    ("ended", "measured"),
    [
        ((0, 'a: dwt-ds collective: {"ranks": 2}', ""), {"ranks": 2}),
        ((1, 'dwt-ds collective: {"ranks": 2}', "RuntimeError: no\n# a hint"), {"problem": "RuntimeError: no"}),
        ((124, "", "no answer within 1200 s"), {"problem": "no answer within 1200 s"}),
        ((5, "", ""), {"problem": "ended with exit code 5 and no answer"}),
    ],
)
def test_the_collective_is_started_as_a_run_is_and_measures_or_has_a_problem(
    ended: tuple[int, str, str], measured: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> tuple[int, str, str]:
        assert command == LAUNCH.command(MODULE)
        assert environment == LAUNCH.environment
        return ended

    monkeypatch.setattr(hosts, "run", answer)
    assert hosts.time_collective(LAUNCH) == measured
