"""Real ranks that measure themselves, for holding plans against."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.utils.distributed import get_free_port

Measure = Callable[..., list[dict[str, Any]]]
WORKER = Path(__file__).parents[2] / "benchmarks" / "measured_run.py"


@pytest.fixture(scope="session")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """`measure(ranks, recipe, *overrides)` trains on so many gloo ranks and returns each rank's figures."""

    def run(ranks: int, recipe: str, *overrides: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("measured")
        common = {
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(get_free_port()),
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
        }
        command = [
            sys.executable,
            str(WORKER),
            str(folder / "report"),
            recipe,
            f"output_dir={folder / 'run'}",
            *overrides,
        ]
        started = []
        for rank in range(ranks):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = open(folder / f"log.{rank}", "w")  # noqa: SIM115
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        try:
            codes = [process.wait(timeout=500) for process in started]
        finally:
            for process in started:
                process.kill()
        logs = "\n".join((folder / f"log.{rank}").read_text() for rank in range(ranks))
        assert codes == [0] * ranks, logs
        return [json.loads((folder / f"report.{rank}").read_text()) for rank in range(ranks)]

    return run
