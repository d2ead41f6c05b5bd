"""Operations and host waits of an optimizer step, counted: on a GPU each operation is about one launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.ranks import Python

# Counts what an unlogged step does beside views; the loop's own thread only, as autograd's calls run in it on a CPU.
COUNTED = """
import json, sys
from collections import Counter
from torch.utils._python_dispatch import TorchDispatchMode
from dwt_ds.pretrain import main
from dwt_ds.run.session import Session

NO_KERNEL = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "permute", "unsqueeze", "squeeze"),
    *("as_strided", "detach", "alias", "reshape", "narrow", "split", "unbind", "_reshape_alias", "flatten", "empty"),
    *("empty_like", "new_empty", "empty_strided", "split_with_sizes", "view_as", "lift_fresh", "is_pinned", "set_"),
    *("_record_function_enter_new", "_record_function_exit"),
}
READS = {"_local_scalar_dense", "item", "is_nonzero"}
counts, steps = Counter(), []


class Count(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.split("::")[1]
        counts["reads" if name in READS else "operations"] += name not in NO_KERNEL
        return operation(*args, **(kwargs or {}))


begin, end = Session.begin_step, Session.end_step


def begin_step(self, step):
    counts.clear()
    return begin(self, step)


def end_step(self, numbers):
    end(self, numbers)
    steps.append(dict(counts))


Session.begin_step, Session.end_step = begin_step, end_step
with Count():
    code = main(sys.argv[1:])
print("COUNTS", json.dumps(steps))
sys.exit(code)
"""


@pytest.mark.parametrize("settings", ["zero2_bf16", "zero2_fp32", "zero1", "zero3"])
def test_an_unlogged_step_has_few_operations_and_two_waits(
    settings: str, python: Python, tiny_recipe: Path, tmp_path: Path
) -> None:
    """The paper's layout: 6 layers, 106 tensors. Two waits are the gradient norm and the request to stop."""
    student = ["student.layers=6", "student.dropout=0", "student.attention=sdpa"]
    train = ["train.max_steps=5", "train.log_every=100", f"deepspeed_config={settings}"]
    ended = python("-c", COUNTED, str(tiny_recipe), f"output_dir={tmp_path}", *student, *train)
    assert ended.code == 0, ended.err
    [line] = [line for line in ended.out.splitlines() if line.startswith("COUNTS ")]
    for step in json.loads(line.removeprefix("COUNTS "))[2:4]:
        assert step["reads"] <= 2, step
        assert step["operations"] <= 650, step
