from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from dwt_ds.doctor import collective


@pytest.mark.parametrize(
    ("gpus", "devices", "options"),
    [
        (0, "", ["--num_gpus", "2"]),
        (8, "", ["--num_gpus", "8"]),
        # These, and not the machine's first two.
        (2, "4,5", []),
        (0, "0", ["--num_gpus", "2"]),
    ],
)
def test_this_machine_alone_is_started_on_the_gpus_a_run_would_have(
    gpus: int, devices: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def answer(command: Sequence[str], seconds: float, variables: Mapping[str, str]) -> tuple[int, str, str]:
        commands.append(command)
        return 0, 'dwt-ds collective: {"ranks": 2}', ""

    monkeypatch.setattr(collective, "run", answer)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    monkeypatch.setenv("MASTER_PORT", "29511")
    assert collective.time_collective(None, gpus) == {"ranks": 2}
    expected = ["--master_port", "29511", *options, "--module", "dwt_ds.engine.collective_check"]
    assert commands[0][commands[0].index("--master_port") :] == expected
