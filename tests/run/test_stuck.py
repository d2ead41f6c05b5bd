"""The watch over ranks, where it cannot write."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness.waiting import wait_until

from dwt_ds.run import stuck


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_does_not_take_the_stacks_does_not_end_the_watch(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stuck, "_WRITING_SECONDS", 0.05)
    monkeypatch.setattr(stuck, "recorded_collectives", lambda: "{}")
    monkeypatch.setattr(stuck, "collectives_begun", lambda recorded: 0)
    monkeypatch.setattr(stuck, "collectives_block", lambda: False)
    (tmp_path / "stuck").write_text("in the way of the folder")
    said: list[str] = []
    watch = stuck.StuckWatch(tmp_path, rank=rank, world_size=2, host="here", seconds=0.2, say=said.append)
    try:
        for times in (1, 2):
            watch.beat(times)
            wait_until(lambda times=times: rank == 1 or len(said) >= times)
        if rank == 1:
            time.sleep(0.6)
        assert len(said) == (2 if rank == 0 else 0)
        assert any(thread.name == "stuck watch" for thread in stuck.threading.enumerate())
    finally:
        watch.end()
    assert all("silent: rank 0, 1" in text for text in said)


def test_a_rank_that_has_recorded_nothing_has_begun_nothing() -> None:
    assert stuck.collectives_begun('{"version": "2.10"}') == 0
    assert stuck.collectives_begun("") == 0
    assert stuck.collectives_begun('{"entries": [{"record_id": 0}, {"record_id": 4}]}') == 5
