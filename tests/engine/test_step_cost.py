"""Operations and host waits of an optimizer step, counted: on a GPU each operation is about one launch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harness.ranks import Python

from dwt_ds.plan.hardware import find_device
from dwt_ds.plan.plan import Plan
from dwt_ds.plan.settings import resolve_plan
from dwt_ds.plan.shapes import build_shapes

# Counts what an unlogged step does beside views; the loop's own thread only, as autograd's calls run in it on a CPU.
COUNTED = """
import json, sys
from collections import Counter
from torch.utils._python_dispatch import TorchDispatchMode
from dwt_ds.plan.simulation import launches_kernel
from dwt_ds.pretrain import main
from dwt_ds.run.session import Session

READS = {"_local_scalar_dense", "item", "is_nonzero"}
counts, steps = Counter(), []


class Count(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.split("::")[1]
        counts["reads" if name in READS else "operations"] += launches_kernel(operation)
        return operation(*args, **(kwargs or {}))


begin, end = Session.begin_step, Session.end_step


def begin_step(self, *arguments):
    counts.clear()
    return begin(self, *arguments)


def end_step(self, numbers):
    end(self, numbers)
    steps.append(dict(counts))


Session.begin_step, Session.end_step = begin_step, end_step
with Count():
    code = main(sys.argv[1:])
print("COUNTS", json.dumps(steps))
sys.exit(code)
"""


SETTINGS = ["student.dropout=0", "student.attention=sdpa", "train.max_steps=5", "train.log_every=100"]


def counted_steps(
    python: Python, recipe: Path, overrides: list[str], steps: Sequence[int] = (3, 4)
) -> list[dict[str, int]]:
    """`operations` and `reads` of `steps`, counted from 1."""
    ended = python("-c", COUNTED, str(recipe), *overrides)
    assert ended.code == 0, ended.err
    [line] = [line for line in ended.out.splitlines() if line.startswith("COUNTS ")]
    counts = json.loads(line.removeprefix("COUNTS "))
    return [counts[step - 1] for step in steps]


@pytest.mark.parametrize(
    "settings",
    ["zero2_bf16", "zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero0", "zero1", "zero2_fp32"))],
)
def test_an_unlogged_step_has_few_operations_and_two_waits(
    settings: str, python: Python, tiny_recipe: Path, tmp_path: Path
) -> None:
    """The paper's layout: 6 layers, 106 tensors. Two waits are the gradient norm and the request to stop.

    On a GPU ZeRO-3 waits for its reduction as well, without reading anything.
    """
    overrides = [f"output_dir={tmp_path}", *SETTINGS, "student.layers=6", f"deepspeed_config={settings}"]
    for step in counted_steps(python, tiny_recipe, overrides):
        assert step["reads"] <= 2, step
        assert step["operations"] <= 650, step


def test_after_the_release_a_step_is_that_of_a_lone_student(python: Python, tiny_recipe: Path, tmp_path: Path) -> None:
    """And an adaptive weight reads a third number only in each tenth step, by when it has long been copied."""
    settings = [*SETTINGS, "train.max_steps=14"]
    to_0 = "distill.soft_weight={schedule: linear, start: 4, end: 0, span_steps: 6}"
    adaptive = "distill.soft_weight={schedule: adaptive, start: 4, end: 0.5}"
    taught, released = counted_steps(python, tiny_recipe, [f"output_dir={tmp_path}/a", *settings, to_0], (5, 9))
    alone = [f"output_dir={tmp_path}/b", *settings, "teacher.path=null"]
    assert [released] == counted_steps(python, tiny_recipe, alone, (9,))
    assert taught["operations"] > 1.1 * released["operations"]
    weighed = [f"output_dir={tmp_path}/c", *settings, adaptive, "teacher.release_after_steps=3"]
    reads = [step["reads"] for step in counted_steps(python, tiny_recipe, weighed, range(3, 12))]
    assert reads == [3 if step == 10 else 2 for step in range(3, 12)]


PLANNED = [
    (0.1, f"deepspeed_config={config}", f"student.layers={layers}", f"train.gradient_accumulation_steps={accumulation}")
    for config in ("zero0", "zero1", "zero2_bf16", "zero3")
    for layers, accumulation in ((2, 1), (6, 2))
]
# Fewer without ZeRO in fp32; unlabelled tokens and a teacher of another vocabulary have losses of their own.
PLANNED += [
    (0.1, "student.layers=6", "deepspeed_config=zero0", "deepspeed.bf16.enabled=false"),
    (0.02, "distill.soft_positions=0.3", "train.gradient_accumulation_steps=2"),
    (0.03, "teacher.vocabulary=shared"),
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", PLANNED, ids=lambda settings: " ".join(settings[1:]))
def test_a_plan_knows_the_operations_of_a_step(
    settings: tuple[Any, ...], python: Python, tiny_recipe: Path, bpe_teacher: Path, tmp_path: Path
) -> None:
    """Those of a GPU without CUDA graphs are those of a run on this machine."""
    close, *overrides = [*settings, *SETTINGS]
    overrides += [f"teacher.path={bpe_teacher}"] if "teacher.vocabulary=shared" in overrides else []
    resolved = resolve_plan(str(tiny_recipe), [*overrides, "train.cuda_graphs=off"], None, 1)
    plan = Plan(resolved, build_shapes(resolved), find_device("h100", 1), 1)
    planned = plan.launches(plan.stage)
    for step in counted_steps(python, tiny_recipe, [f"output_dir={tmp_path}", *overrides]):
        assert planned == pytest.approx(step["operations"], rel=close)
