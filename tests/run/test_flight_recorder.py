"""How far a rank came, by the record of its collectives."""

from __future__ import annotations

from dwt_ds.engine.flight_recorder import collectives_begun


def test_a_rank_that_has_recorded_nothing_has_begun_nothing() -> None:
    assert collectives_begun('{"version": "2.10"}') == 0
    assert collectives_begun("") == 0
    assert collectives_begun('{"entries": [{"record_id": 0}, {"record_id": 4}]}') == 5
