"""Steps of a real run, timed and profiled in this process: what training_speed.py shows for each micro-batch."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from device_trace import device_work
from timing import synchronize
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from dwt_ds.base.locks import release_locks
from dwt_ds.data.batches import Batch
from dwt_ds.engine.student import peak_memory_bytes
from dwt_ds.plan.hardware import find_device
from dwt_ds.plan.plan import Plan
from dwt_ds.plan.settings import resolve_plan
from dwt_ds.plan.shapes import build_shapes
from dwt_ds.pretrain import train
from dwt_ds.run.assemble import assemble
from dwt_ds.run.session import Session
from dwt_ds.run.stop import StopRequest

WARM_UP_STEPS, PROFILED_STEPS = 10, 3
MEBIBYTE = 1 << 20


class MeasuredSession:
    """A run's session for the loop in pretrain.py; a subclass measures its steps. Nothing is exported at the end."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def finish(self) -> None:
        """Only the watch over the run's progress ends."""
        self._session._stuck.end()


class TimedSession(MeasuredSession):
    """Ends after the timed and the profiled steps.

    Args:
        session: of the run.
        steps: the most steps to time.
        seconds: no timed step begins after this long.
        trace: file for the profiled steps, in Chrome's format; not written without a GPU.
    """

    def __init__(self, session: Session, steps: int, seconds: float, trace: Path) -> None:
        super().__init__(session)
        self._most_steps, self._most_seconds, self._trace = steps, seconds, trace
        self._tokens = 0
        self.figures: dict[str, Any] = {}

    def steps(self) -> Iterator[int]:
        """Warm-up, timed steps, profiled steps. After a step that compiles, the time begins anew."""
        steps = self._session.steps()
        yield from islice(steps, WARM_UP_STEPS)
        synchronize()
        tokens_before, began, count, compiled = self._tokens, time.perf_counter(), 0, _compilations()
        for number, step in enumerate(islice(steps, self._most_steps), 1):
            yield step
            count += 1
            if _compilations() != compiled and number < self._most_steps:
                # A new shape, such as the first batch with padding, was compiled: not the speed of a step.
                synchronize()
                tokens_before, began, count, compiled = self._tokens, time.perf_counter(), 0, _compilations()
            if time.perf_counter() - began > self._most_seconds:
                break
        synchronize()
        seconds = time.perf_counter() - began
        rate = (self._tokens - tokens_before) / seconds
        utilization = self._session.log.utilization
        assert utilization is not None  # rank 0 has it, and there is no other
        shares = utilization.shares(rate)
        self.figures = {"steps": count, "tokens_per_second": round(rate, 1)}
        self.figures |= {"ms_per_step": round(1e3 * seconds / count, 3)}
        self.figures |= {name: round(share, 4) for name, share in shares.items()}
        self.figures["flops_per_second"] = shares["mfu"] * utilization.peak_flops_per_second
        if torch.cuda.is_available():
            self.figures["peak_mib"] = round(peak_memory_bytes(self._session.device) / MEBIBYTE)
        with _profiled() as profiler:
            yield from islice(steps, PROFILED_STEPS)
            synchronize()
        if profiler is not None:
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._trace))
            with gzip.open(self._trace, "rt") as file:
                events = list(json.load(file)["traceEvents"])
            self.figures |= device_work(events, PROFILED_STEPS, seconds / count)
        steps.close()

    def begin_step(self, step: int, micro_batches: Sequence[Batch]) -> Any:
        """As the session's; counts the tokens."""
        self._tokens += sum(batch.token_count for batch in micro_batches)
        return self._session.begin_step(step, micro_batches)


def time_steps(recipe: str, overrides: list[str], *, steps: int, seconds: float, trace: Path) -> dict[str, Any]:
    """Figures of a run of the recipe on this process's device; `peak_mib` is what it adds to what is allocated.

    `trace` is a file ending in .json.gz for what a GPU does in the profiled steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The last step is not reached: it would save a checkpoint.
        most = WARM_UP_STEPS + steps + PROFILED_STEPS + 1
        settings = [f"output_dir={folder}", f"train.max_steps={most}", "train.log_every=1000000"]
        settings += ["train.eval_every=0", "train.checkpoint_every=0"]
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        session = assemble(recipe, [*overrides, *settings], None, StopRequest())
        assert session is not None  # the folder is new
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        timed = TimedSession(session, steps, seconds, trace)
        train(timed)  # type: ignore[arg-type]
        release_locks()
        if session.teacher is not None:
            session.teacher.release()
        # DeepSpeed's hooks hold on to the engine; without this its memory stays for as long as the process.
        session.student.destroy()
    optimizer = session.student.optimizer.optimizer
    timed.figures["optimizer"] = f"{type(optimizer).__name__} of {type(optimizer).__module__.partition('.')[0]}"
    if "peak_mib" in timed.figures:
        timed.figures["peak_mib"] -= round(before / MEBIBYTE)
    return timed.figures


def plan_of_one_rank(recipe: str, overrides: list[str]) -> Plan:
    """What `dwt-ds plan` expects of a run on one GPU."""
    settings = resolve_plan(recipe, overrides, None, 1)
    return Plan(settings, build_shapes(settings), find_device("h100", 1), 1)


def planned_peak_mib(recipe: str, overrides: list[str]) -> int:
    """What `dwt-ds plan` expects as the peak of that run's memory."""
    plan = plan_of_one_rank(recipe, overrides)
    return round(plan.memory(plan.stage).peak / MEBIBYTE)


def _compilations() -> int:
    return int(counters["stats"]["unique_graphs"])


def _profiled() -> Any:
    if not torch.cuda.is_available():
        return nullcontext()
    return profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
