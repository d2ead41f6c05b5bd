"""What holds for every test: where programs and compiled operators are, and in which order tests run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from dwt_ds.engine.build_locks import find_abandoned_locks

pytest_plugins = [
    "harness.ranks",
    "harness.launcher",
    "harness.watched",
    "harness.tiny",
    "harness.corpus",
    "harness.plans",
    "harness.errors",
    "harness.writers",
]

# There is a worker of tests for each core, and threads of both would wait for one another.
torch.set_num_threads(1)

# This environment's programs come first in whatever a test starts. DeepSpeed's operators are compiled anew whenever
# another version of ninja looks at them, so all have to find the same one.
PROGRAMS = Path(sys.executable).parent
os.environ["PATH"] = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"

# Operators compiled by another environment would be compiled anew, and a build killed there would stop tests here.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(PROGRAMS.parent / "torch_extensions"))
for lock in find_abandoned_locks():
    lock.unlink(missing_ok=True)  # the other worker may have been faster

# A busy machine is no fault of an example's.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that while one worker is at them the other has the rest to do."""

    def allowed_seconds(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return float(mark.args[0]) if mark else 0.0

    items.sort(key=allowed_seconds, reverse=True)


@pytest.fixture
def hears_hangups() -> Iterator[None]:
    """SIGHUP is not ignored, as it is where the tests were started with nohup."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, inherited)
