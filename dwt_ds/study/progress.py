"""Progress lines of a study, whose runs write their own to log files."""

from __future__ import annotations

import time
from collections.abc import Mapping

from dwt_ds.run.progress import clock
from dwt_ds.study.folder import StudyFolder

# Seconds between lines: at least, and as a share of the time since the start.
_SECONDS, _SHARE = 10.0, 0.02


class StudyProgress:
    """Counts the optimizer steps that the runs of a study have logged, and their rate since the last line.

    `steps` are those of each whole run, by name.
    """

    def __init__(self, folder: StudyFolder, steps: Mapping[str, int]) -> None:
        self._folder, self._steps = folder, dict(steps)
        self._began = self._before = time.monotonic()
        self._done_before = sum(self._done().values())

    def seconds_to_next(self) -> float:
        """Until the next line is due; 0 once it is."""
        pause = max(_SECONDS, _SHARE * (self._before - self._began))
        return max(0.0, self._before + pause - time.monotonic())

    def line(self, running: int) -> str:
        """`50s  3 of 36 runs finished, 14 running  step 4,880 of 87,840, 301.5 steps/s, ETA 4m35s`."""
        now, by_run = time.monotonic(), self._done()
        done, total = sum(by_run.values()), sum(self._steps.values())
        rate = (done - self._done_before) / (now - self._before)
        finished = sum(by_run[name] == steps for name, steps in self._steps.items())
        self._before, self._done_before = now, done
        left = f", ETA {clock((total - done) / rate)}" if rate > 0 else ""
        return (
            f"{clock(now - self._began)}  {finished} of {len(self._steps)} runs finished, {running} running  "
            f"step {done:,} of {total:,}, {rate:,.1f} steps/s{left}"
        )

    def _done(self) -> dict[str, int]:
        """Logged steps of each run."""
        done = {}
        for name in self._steps:
            run = self._folder.run(name)
            done[name] = run.finished_steps() or max((row["step"] for row in run.metrics_rows()), default=0)
        return done
