"""Finds the rank that keeps the others waiting, and the line of code it is at.

All that the others see of a rank that hangs is a collective that does not end. So every rank watches itself: when its
last sign of life is too old, it writes its stack, and the collectives that its process groups have recorded, to a file.
The rank that the others wait for has begun fewer collectives than they have, or has written nothing. Where a collective
blocks the thread that calls it, as on a CPU, it is also the one that is not inside a collective. Rank 0 reads all files
and reports.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

from dwt_ds.base.run_files import STUCK

_COLLECTIVES = ("distributed_c10d.py", "comm/torch.py", "comm/comm.py")
_WRITING_SECONDS = 2.0
"""How long rank 0 waits for the others to write."""


class StuckWatch:
    """Reports once each time the ranks stop making progress.

    Args:
        folder: of the run; each rank writes a file in its `stuck/`.
        rank, world_size, host: this process's rank, the number of ranks, this machine's name.
        seconds: a sign of life older than this is reported.
        say: prints a line; called on rank 0 only.
    """

    def __init__(
        self, folder: Path, *, rank: int, world_size: int, host: str, seconds: float, say: Callable[[str], None]
    ) -> None:
        self._folder, self._rank, self._world_size, self._host = folder / STUCK, rank, world_size, host
        self._seconds, self._say = seconds, say
        self._step, self._beat = 0, time.monotonic()
        self._main = threading.get_ident()
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="stuck watch").start()

    def beat(self, step: int) -> None:
        """A sign of life: `step` optimizer steps are done."""
        self._step, self._beat = step, time.monotonic()

    def end(self) -> None:
        """Stop watching."""
        self._done.set()

    def _watch(self) -> None:
        reported = 0.0
        while not self._done.wait(min(1.0, self._seconds / 4)):
            beat = self._beat
            if time.monotonic() - beat > self._seconds and beat != reported:
                reported = beat
                with suppress(OSError):  # rank 0 reports a rank that cannot write as silent
                    self._write()
                if self._rank == 0:
                    self._done.wait(_WRITING_SECONDS)
                    self._say(self._report())

    def _write(self) -> None:
        recorded = recorded_collectives()
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        place = next((f for f in reversed(stack) if "dwt_ds" in Path(f.filename).parts), stack[-1])
        facts = {
            "rank": self._rank,
            "host": self._host,
            "step": self._step,
            "place": f"{Path(place.filename).name}:{place.lineno} {place.name}",
            "collectives_begun": collectives_begun(recorded),
            "elsewhere": collectives_block() and not any(frame.filename.endswith(_COLLECTIVES) for frame in stack),
            "stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in stack],
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"rank_{self._rank:05d}.json"
        file.with_suffix(".collectives.json").write_text(recorded, encoding="utf-8")
        unfinished = file.with_suffix(".tmp")  # not `atomic_file`, which would wait for a disk that does not answer
        unfinished.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        os.replace(unfinished, file)

    def _report(self) -> str:
        found = read_reports(self._folder, self._world_size, time.time() - self._seconds - 4 * _WRITING_SECONDS)
        lines = [
            f"no step has ended for {self._seconds:.0f} s ({self._step} done); stacks of all ranks in {self._folder}"
        ]
        lines += [f"  {line}" for line in who_waits_for_whom(found, self._world_size)]
        return "\n".join(lines)


def read_reports(folder: Path, world_size: int, newer_than: float) -> list[dict[str, Any]]:
    """What the ranks wrote to the run's folder `stuck` after a time (seconds since the epoch), by rank."""
    found = []
    for rank in range(world_size):
        file = folder / f"rank_{rank:05d}.json"
        with suppress(OSError):
            if file.stat().st_mtime > newer_than:
                found.append(json.loads(file.read_text(encoding="utf-8")))
    return found


def who_waits_for_whom(found: Sequence[Mapping[str, Any]], world_size: int) -> list[str]:
    """A line for each rank that keeps the others waiting or is silent, from the reports of those that wrote one."""
    silent = sorted(set(range(world_size)) - {facts["rank"] for facts in found})
    most = max((facts["collectives_begun"] for facts in found), default=0)
    behind = [facts for facts in found if facts["collectives_begun"] < most]
    lines = [
        f"rank {facts['rank']} on {facts['host']} keeps the others waiting at {facts['place']}"
        for facts in behind or [facts for facts in found if facts["elsewhere"]]
    ]
    if silent:
        lines.append(f"silent: rank {', '.join(map(str, silent))}; dead, stopped, or its disk does not answer")
    return lines or ["all ranks wait in the same collective: look at the network"]


def recorded_collectives() -> str:
    """This rank's last collectives with their stacks, as JSON; empty where torch keeps no record of them.

    NCCL's group writes its record by itself when a collective times out; gloo's never does.
    """
    recorder = "_dump_nccl_trace_json" if dist.get_backend() == "nccl" else "_dump_fr_trace_json"
    dump = getattr(_distributed_c10d, recorder, None)
    if dump is None:
        return ""
    recorded = dump()
    return recorded if isinstance(recorded, str) else bytes(recorded).decode()


def collectives_begun(recorded: str) -> int:
    """How many collectives this rank has begun since its start, over all of its groups."""
    # Before the first collective there is no such key.
    entries = json.loads(recorded).get("entries", []) if recorded else []
    return max((int(entry["record_id"]) + 1 for entry in entries), default=0)


def collectives_block() -> bool:
    """Whether a thread that calls a collective stays in it until it is over, as with gloo."""
    return dist.get_backend() != "nccl"
