"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from harness.ranks import Processes


def wait_until(condition: Callable[[], object], ranks: Processes | None = None, seconds: float = 200.0) -> None:
    """The test fails if that takes so long, or if these ranks have ended before."""
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up or (ranks and not ranks.running()):
            pytest.fail(ranks.output() if ranks else f"not so after {seconds:.0f} s")
        time.sleep(0.02)
