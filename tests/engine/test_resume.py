"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness.ranks import Run, Start, Train
from harness.runs import completed, untimed_rows
from safetensors.torch import load_file

# Many more than a run takes between its first checkpoint and its death.
STEPS = 40
# Dropout on, the epoch's end inside the run, micro-batches of several accumulation steps.
SETTINGS = [
    f"train.max_steps={STEPS}",
    "train.checkpoint_every=4",
    "train.gradient_accumulation_steps=2",
    "train.eval_every=20",
    "student.dropout=0.2",
    "distill.soft_weight={schedule: linear, start: 4, end: 1}",
]

# Ranks that read a converted checkpoint, one of them late. As with NCCL, a broadcast's source waits for nobody.
CONVERTED = """
import sys, time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
import torch.distributed as dist
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint import save_and_load
from dwt_ds.engine.checkpoint.manifest import NewestCheckpoint
ranks.start_ranks()
store, numbers = dist.distributed_c10d._get_default_store(), count()

def broadcast(values, src, device):
    key = f"broadcast {next(numbers)}"
    if ranks.rank() == src:
        store.set(key, "sent")
    store.get(key)

dist.broadcast_object_list = broadcast

def read(engine, universal):
    time.sleep(3 * ranks.rank())
    assert universal.is_dir(), f"rank {ranks.rank()}: deleted before it was read"

save_and_load._convert = lambda path, universal: universal.mkdir()
save_and_load._load = read
engine = SimpleNamespace(_config=SimpleNamespace(load_universal_checkpoint=False))
written_by_three = NewestCheckpoint(Path(sys.argv[1]) / "step_00000004", [], {"world_size": 3})
save_and_load.load_checkpoint(engine, written_by_three, 0)
ranks.stop_ranks()
"""


def kill_after_checkpoint(start_ranks: Start, ranks: int, arguments: list[str], output: Path) -> int:
    """Start a run, SIGKILL all of its ranks once a checkpoint stands; the step of the newest then."""
    started = start_ranks([["-m", "dwt_ds.pretrain", *arguments]] * ranks)
    pointer = output / "checkpoints" / "latest"
    waited_until = time.monotonic() + 200
    while not pointer.is_file() and time.monotonic() < waited_until and started.running():
        time.sleep(0.005)
    assert started.running(), started.output()
    started.kill()
    return int(pointer.read_text().split("_")[1])


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), pytest.param(2, 0, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_identically(
    ranks: int, workers: int, train: Train, start_ranks: Start, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Also if batches come from other processes than those of the run that nothing happened to."""
    completed(train(ranks, [str(tiny_recipe), f"output_dir={tmp_path / 'straight'}", *SETTINGS]))
    arguments = [str(tiny_recipe), f"output_dir={tmp_path / 'killed'}", *SETTINGS, f"data.workers={workers}"]
    step = kill_after_checkpoint(start_ranks, ranks, arguments, tmp_path / "killed")
    assert 4 <= step < STEPS, "killed too late to show anything"

    output = completed(train(ranks, arguments))
    assert "resuming from" in output
    assert untimed_rows(tmp_path / "killed") == untimed_rows(tmp_path / "straight")
    straight = load_file(tmp_path / "straight" / "export" / "model.safetensors")
    killed = load_file(tmp_path / "killed" / "export" / "model.safetensors")
    assert straight.keys() == killed.keys()
    assert all(killed[name].equal(straight[name]) for name in straight)


def test_a_finished_run_says_so_and_does_nothing(train: Train, tiny_recipe: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_recipe), f"output_dir={tmp_path}", "train.max_steps=2"]
    assert train(1, arguments)[0] == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    code, output = train(1, arguments)
    assert code == 0
    assert "already finished at step 2" in output
    assert "other settings" not in output
    code, output = train(1, [*arguments, "train.learning_rate=0.5", "teacher.path=null"])
    assert code == 0
    assert "already finished at step 2" in output
    [line] = [line for line in output.splitlines() if "it was trained with other settings (" in line]
    assert line.endswith("-> None, train.learning_rate: 0.0005 -> 0.5); choose another output_dir to train with these")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_passed_over(train: Train, tiny_recipe: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_recipe), f"output_dir={tmp_path}", "train.checkpoint_every=2"]
    assert train(1, arguments)[0] == 0
    newest = tmp_path / "checkpoints" / "step_00000004"
    shard = next(newest.glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (tmp_path / "complete.json").unlink()

    output = completed(train(1, arguments))
    assert f"step_00000004/{shard.name}: the contents have changed" in output
    assert "resuming from" in output
    assert "step_00000002 at step 2" in output


def test_a_converted_checkpoint_stays_until_the_last_rank_has_read_it(run_ranks: Run, tmp_path: Path) -> None:
    for rank in run_ranks([["-c", CONVERTED, str(tmp_path)]] * 2):
        assert rank.code == 0, rank.err
    assert not list(tmp_path.iterdir())
