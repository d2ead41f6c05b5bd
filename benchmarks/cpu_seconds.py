"""Processor time of a step of several runs, which take turns on one core: other work on the machine slows all alike.

    python benchmarks/cpu_seconds.py [--steps 320] RECIPE [key=value ...] + RECIPE [key=value ...] [+ ...]

Prints the median of each run's steps after the first 100, with quartiles, and as a multiple of the first run's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

WARM_UP_STEPS = 100
RUN = """
import json, sys, time
from dwt_ds.pretrain import main
from dwt_ds.run.session import Session
path, *arguments = sys.argv[1:]
ends, end = [], Session.end_step
def end_step(self, numbers):
    end(self, numbers)
    ends.append(time.process_time())
Session.end_step = end_step
code = main(arguments)
with open(path, "w") as file:
    json.dump(ends, file)
sys.exit(code)
"""


def processor_seconds(runs: list[list[str]], steps: int, folder: Path) -> list[list[float]]:
    """Of each step of each run after the first ones."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the runs inherit it
    settings = [f"train.max_steps={steps}", f"train.log_every={steps}", "train.eval_every=0"]
    settings += ["train.checkpoint_every=0"]
    processes, files = [], [folder / f"{number}.json" for number in range(len(runs))]
    for run, file in zip(runs, files):
        command = [sys.executable, "-c", RUN, str(file), *run, *settings, f"output_dir={file}.run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    if any([process.wait() for process in processes]):
        sys.exit(1)
    ends = [json.loads(file.read_text(encoding="utf-8"))[WARM_UP_STEPS:] for file in files]
    return [[after - before for before, after in pairwise(each)] for each in ends]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=320)
    options, words = parser.parse_known_args()
    if options.steps < WARM_UP_STEPS + 3:
        parser.error(
            f"--steps {options.steps}: the first {WARM_UP_STEPS} are not counted; take {WARM_UP_STEPS + 3} or more"
        )
    runs: list[list[str]] = [[]]
    for word in words:
        if word == "+":
            runs.append([])
        else:
            runs[-1].append(word)
    with tempfile.TemporaryDirectory() as folder:
        found = processor_seconds(runs, options.steps, Path(folder))
    first = statistics.median(found[0])
    for run, seconds in zip(runs, found):
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(f"{middle:.4f} s ({low:.4f} to {high:.4f}), {middle / first:.3f} times the first: {' '.join(run)}")


if __name__ == "__main__":
    main()
