"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.ranks import Run, Start
from harness.runs import assert_same_run
from harness.tiny import TinyRun
from harness.waiting import wait_until

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

# `dwt_ds.pretrain` for whose converted checkpoint there is no room.
FULL = """
import resource, sys
from dwt_ds.engine.checkpoint import save_and_load
from dwt_ds.pretrain import main
convert = save_and_load.ds_to_universal.main

HARD = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, HARD))

def convert_too_much(options):
    limit(1 << 8)
    try:
        convert(options)
    finally:
        limit(HARD)  # for what is printed

save_and_load.ds_to_universal.main = convert_too_much
sys.exit(main())
"""


def kill_after_checkpoint(start_ranks: Start, ranks: int, arguments: list[str], output: Path) -> int:
    """Start a run, SIGKILL all of its ranks once a checkpoint stands; the step of the newest then."""
    started = start_ranks([["-m", "dwt_ds.pretrain", *arguments]] * ranks)
    pointer = output / "checkpoints" / "latest"
    wait_until(pointer.is_file, started)
    started.kill()
    return int(pointer.read_text().split("_")[1])


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), pytest.param(2, 0, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_identically(
    ranks: int, workers: int, tiny_run: TinyRun, start_ranks: Start, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Also if batches come from other processes than those of the run that nothing happened to."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    tiny_run(straight, *SETTINGS, ranks=ranks)
    settings = [*SETTINGS, f"data.workers={workers}"]
    step = kill_after_checkpoint(start_ranks, ranks, [str(tiny_recipe), f"output_dir={killed}", *settings], killed)
    assert 4 <= step < STEPS, "killed too late to show anything"
    assert "resuming from" in tiny_run(killed, *settings, ranks=ranks)
    assert_same_run(killed, straight)


def test_a_finished_run_says_with_which_settings_it_was_trained(tiny_run: TinyRun, tmp_path: Path) -> None:
    tiny_run(tmp_path, "train.max_steps=2")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    output = tiny_run(tmp_path, "train.max_steps=2", "train.learning_rate=0.5", "teacher.path=null")
    assert "already finished at step 2" in output
    [line] = [line for line in output.splitlines() if "it was trained with other settings (" in line]
    assert line.endswith("-> None, train.learning_rate: 0.0005 -> 0.5); choose another output_dir to train with these")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_damaged_checkpoints_are_passed_over(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Three of them, and a stray half-written folder: the fourth is taken."""
    settings = ["train.checkpoint_every=1", "train.keep_last=4"]
    tiny_run(tmp_path, *settings)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step_00000004" / "generators_00000.pt").unlink()
    cut = next((checkpoints / "step_00000003").glob("*model_states.pt"))
    size = cut.write_bytes(cut.read_bytes()[:-100])
    changed = next((checkpoints / "step_00000002").glob("*optim_states.pt"))
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    (checkpoints / "step_00000009.tmp").mkdir()
    (tmp_path / "complete.json").unlink()

    output = tiny_run(tmp_path, *settings)
    assert "step_00000004/generators_00000.pt: missing" in output
    assert f"step_00000003/{cut.name}: {size} bytes, the manifest says" in output
    assert f"step_00000002/{changed.name}: the contents have changed" in output
    assert "resuming from" in output
    assert "step_00000001 at step 1" in output


def test_a_converted_checkpoint_stays_until_the_last_rank_has_read_it(run_ranks: Run, tmp_path: Path) -> None:
    for rank in run_ranks([["-c", CONVERTED, str(tmp_path)]] * 2):
        assert rank.code == 0, rank.err
    assert not list(tmp_path.iterdir())


def test_a_converted_checkpoint_that_cannot_be_deleted_is_left(run_ranks: Run, tmp_path: Path) -> None:
    """Rank 0 alone would see the error, and end while the others wait for it."""
    link = CONVERTED.replace("universal.mkdir()", "universal.symlink_to(path.parent)")  # which rmtree refuses
    [rank] = run_ranks([["-c", link, str(tmp_path)]])
    assert rank.code == 0, rank.err
    assert [left.name for left in tmp_path.iterdir()] == ["step_00000004.universal.tmp"]


def test_a_checkpoint_that_there_is_no_room_to_convert_is_reported_in_one_line(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    tiny_run(tmp_path, ranks=2)
    output = tiny_run(tmp_path, "train.max_steps=5", code=2, program=["-c", FULL])
    assert "Traceback" not in output
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "step_00000004: its optimizer state cannot be written anew for another number of ranks (" in line
    assert line.endswith("MB free there); make room, or start as many ranks as wrote it")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000004"]
