"""How long the host takes for an operation, measured on a CPU: dwt_ds/plan/hardware.py, LAUNCH_SECONDS.

    python benchmarks/host_time.py [--steps 200] [--layers 6]

A student of some layers of 16 columns trains alone, a row of 16 tokens at a time: next to no arithmetic, and nearly as
many operations as in the paper's layout. The processor time of a step, in one thread, is divided by the operations
that `dwt-ds plan` counts. It is that of the fastest 20 steps, as other work on the machine slows a core down. A row is
added to benchmarks/results/host_time.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from rows import RESULTS, append_row, processor_and_cores
from step_speed import MeasuredSession, plan_of_one_rank

from dwt_ds.base.quiet import quieten_libraries
from dwt_ds.engine.ranks import start_ranks, stop_ranks
from dwt_ds.pretrain import train
from dwt_ds.run.assemble import assemble
from dwt_ds.run.session import Session
from dwt_ds.run.stop import StopRequest

WARM_UP_STEPS, ROUND_STEPS = 20, 20
SETTINGS = ["student.hidden_size=16", "student.num_heads=2", "student.dropout=0"]
SETTINGS += ["student.attention=sdpa", "teacher.path=null", "train.micro_batch_size=1", "train.eval_every=0"]
SETTINGS += ["train.checkpoint_every=0", "train.log_every=1000000", "deepspeed_config=zero2_fp32"]


class _Timed(MeasuredSession):
    """Ends after so many rounds of timed steps."""

    def __init__(self, session: Session, rounds: int) -> None:
        super().__init__(session)
        self._rounds = rounds
        self.seconds: list[float] = []
        """Processor time of a step, all threads: the mean of each round."""

    def steps(self) -> Iterator[int]:
        steps = self._session.steps()
        yield from islice(steps, WARM_UP_STEPS)
        for _ in range(self._rounds):
            began = time.process_time()
            yield from islice(steps, ROUND_STEPS)
            self.seconds.append((time.process_time() - began) / ROUND_STEPS)
        steps.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="to time (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="of the student (default: %(default)s)")
    options = parser.parse_args()
    steps = options.steps
    os.environ["OMP_NUM_THREADS"] = "1"  # else `start_ranks` takes all cores
    torch.set_num_threads(1)
    quieten_libraries()
    with tempfile.TemporaryDirectory() as folder:
        stand_in = [sys.executable, str(Path(__file__).with_name("stand_in_data.py")), f"{folder}/data"]
        subprocess.run([*stand_in, "--seq-len", "16", "--vocabulary", "300"], check=True, capture_output=True)
        # The last step is not reached: it would save a checkpoint.
        overrides = [
            *SETTINGS,
            f"student.layers={options.layers}",
            f"data.dir={folder}/data",
            f"train.max_steps={WARM_UP_STEPS + steps + 1}",
        ]
        plan = plan_of_one_rank("quickstart", overrides)
        operations = plan.launches(plan.stage)
        start_ranks()
        session = assemble("quickstart", [*overrides, f"output_dir={folder}/run"], None, StopRequest())
        assert session is not None  # the folder is new
        timed = _Timed(session, steps // ROUND_STEPS)
        train(timed)  # type: ignore[arg-type]
        stop_ranks()
    step_seconds = min(timed.seconds)
    row = {
        "operations_a_step": operations,
        "ms_a_step": round(1e3 * step_seconds, 3),
        "us_an_operation": round(1e6 * step_seconds / operations, 2),
        "median_ms_a_step": round(1e3 * statistics.median(timed.seconds), 3),
        "steps": steps,
        "torch": torch.__version__,
        "processor": processor_and_cores(),
    }
    append_row(RESULTS / "host_time.csv", row)
    print(row)


if __name__ == "__main__":
    main()
