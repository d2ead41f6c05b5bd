"""dwt_ds.pretrain on a CPU, as if passes could be recorded there: a replay runs the pass again, on the same buffers.

It prints how often each recording was replayed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from dwt_ds.run import assemble, models


class Repetition:
    def __init__(self, forward: Callable[[], Any]) -> None:
        self._forward, self.replays = forward, 0
        self.output: Any = None

    def replay(self) -> None:
        self.replays += 1
        with torch.enable_grad():
            self.output = self._forward()


class Repeater:
    made: list[Repetition] = []

    def record(self, forward: Callable[[], Any]) -> Repetition:
        self.made.append(Repetition(forward))
        return self.made[-1]


if __name__ == "__main__":
    from dwt_ds.pretrain import main

    models.CudaRecorder = Repeater  # type: ignore[misc,assignment]
    models.uses_graphs = lambda resolved: resolved.config.train.cuda_graphs != "off"
    assemble.may_replay_student = lambda resolved: False  # type: ignore[attr-defined]
    code = main()
    print("replays", [each.replays for each in Repeater.made], flush=True)
    sys.exit(code)
