"""dwt_ds.pretrain on a CPU, as if passes could be recorded there: a replay runs the pass again, on the same buffers.

It prints how often each recording was replayed, and what of the teacher outlives its release.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from dwt_ds.distill.objective import TeacherView
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.engine.training_graphs import _Pass
from dwt_ds.run import assemble, models


class Repetition:
    def __init__(self, forward: Callable[[], Any], replays: list[int]) -> None:
        self._forward, self._replays, self._number = forward, replays, len(replays)
        self.output: Any = None
        replays.append(0)

    def replay(self) -> None:
        self._replays[self._number] += 1
        with torch.enable_grad():
            self.output = self._forward()


class Repeater:
    replays: list[int] = []
    """Of each recording, also of those that are gone."""

    def record(self, forward: Callable[[], Any]) -> Repetition:
        return Repetition(forward, self.replays)


def watch_the_release() -> None:
    plain = TeacherEngine.release

    def release(teacher: TeacherEngine) -> None:
        gc.collect()  # as `release` itself does before it empties the allocator's cache
        held = [each for each in gc.get_objects() if isinstance(each, (_Pass, TeacherView))]
        head = [weakref.ref(each) for each in teacher.head if each is not None]
        plain(teacher)
        left = sum(each() is not None for each in head)
        print(f"release: {len(held)} passes and views, {left} tensors of the head", flush=True)

    TeacherEngine.release = release  # type: ignore[method-assign]


if __name__ == "__main__":
    from dwt_ds.pretrain import main

    models.CudaRecorder = Repeater  # type: ignore[misc,assignment]
    models.uses_graphs = lambda resolved: resolved.config.train.cuda_graphs != "off"
    assemble.may_replay_student = lambda resolved: False  # type: ignore[attr-defined]
    watch_the_release()
    code = main()
    print("replays", Repeater.replays, flush=True)
    sys.exit(code)
