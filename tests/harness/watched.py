"""Ranks of `dwt_ds.pretrain` that note what they see of their run.

soft_weights   of every step, as this rank's loss has them
optimizer      settings as DeepSpeed's optimizer has them after the last step
collectives    what DeepSpeed did within training steps: calls by name, and elements that it gathered
parameters     the student's elements
teacher        its parameters' dtype
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.ranks import Train

# Attributes of the stages' optimizers; None where one has no such thing.
SETTINGS = ("overlap_comm", "partition_gradients", "cpu_offload")


class Watched(NamedTuple):
    code: int
    output: str
    notes: list[dict[str, Any]]
    """By rank."""


Watch = Callable[[Sequence[str]], Watched]


@pytest.fixture(scope="session")
def watch(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Watch:
    """`watch(arguments)` is `train` of two ranks that note what they see."""

    def watch_ranks(arguments: Sequence[str]) -> Watched:
        notes = tmp_path_factory.mktemp("notes")
        code, output = train(2, arguments, program=[__file__], environment={"NOTES": str(notes)})
        return Watched(code, output, [json.loads(file.read_text()) for file in sorted(notes.iterdir())])

    return watch_ranks


def count_collectives(counts: Counter[str], now: dict[str, bool]) -> None:
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.utils import groups

    def count(name: str) -> None:
        plain = getattr(TorchBackend, name)

        def counting(self: Any, *arguments: Any, **keywords: Any) -> Any:
            if now["training"]:
                counts[name] += 1
                counts["gathered"] += keywords["output_tensor"].numel() if name == "all_gather_into_tensor" else 0
                second = groups._get_zero_param_intra_parallel_group()
                counts["in the second partition"] += second is not None and keywords.get("group") is second
            return plain(self, *arguments, **keywords)

        setattr(TorchBackend, name, counting)

    for name in ("all_reduce", "reduce", "all_gather_into_tensor"):
        count(name)


def watch_run() -> None:
    from dwt_ds.run.session import Session, StepNumbers

    counts: Counter[str] = Counter()
    now = {"training": False}
    soft_weights: list[float] = []
    plain_begin, plain_end, plain_finish = Session.begin_step, Session.end_step, Session.finish
    count_collectives(counts, now)

    def begin_step(self: Session, *arguments: Any) -> StepNumbers:
        now["training"] = True
        numbers = plain_begin(self, *arguments)
        soft_weights.append(float(numbers.scalars.soft_weight))
        return numbers

    def end_step(self: Session, numbers: StepNumbers) -> None:
        now["training"] = False
        plain_end(self, numbers)

    def finish(self: Session) -> None:
        optimizer = self.student.optimizer
        parameters = [getattr(each, "ds_numel", each.numel()) for each in self.student.module.parameters()]
        notes = {
            "soft_weights": soft_weights,
            "optimizer": {"is": type(optimizer).__name__} | {name: getattr(optimizer, name, None) for name in SETTINGS},
            "collectives": counts,
            "parameters": sum(parameters),
            "teacher": str(next(self.teacher.model.parameters()).dtype) if self.teacher else None,
        }
        (Path(os.environ["NOTES"]) / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(notes))
        plain_finish(self)

    Session.begin_step, Session.end_step, Session.finish = begin_step, end_step, finish


if __name__ == "__main__":
    from dwt_ds.pretrain import main

    watch_run()
    sys.exit(main())
