"""Batches: the same rows and masks on any number of ranks, after a resume, after a change of world size."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import pickle
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.batches import Batch, StepBatches, step_loader, validation_batches
from dwt_ds.data.prepared import PreparedData


def steps(
    data: PreparedData, *, global_batch: int, world_size: int, accumulation: int = 1, **options: Any
) -> list[StepBatches]:
    """One StepBatches a rank."""
    return [
        StepBatches(
            data.train,
            data.facts,
            DataConfig(**options.get("masking", {})),
            seed=options.get("seed", 7),
            micro_batch_size=global_batch // (world_size * accumulation),
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            soft_positions=options.get("soft_positions", "labelled"),
            rows_before=options.get("rows_before", 0),
            first_step=options.get("first_step", 0),
        )
        for rank in range(world_size)
    ]


def real_tokens(batch: Batch) -> torch.Tensor:
    """(B, S) bool."""
    return torch.ones_like(batch.input_ids).bool() if batch.attention_mask is None else batch.attention_mask.bool()


def content(batches: list[Batch]) -> list[tuple[int, tuple[int, ...], tuple[tuple[int, int], ...]]]:
    """(row id, masked tokens without padding, (column, label) pairs) of each row, sorted."""
    rows = []
    for batch in batches:
        width = batch.input_ids.shape[1]
        # Without a label: -1.
        labels = list(itertools.zip_longest(batch.positions.tolist(), batch.labels.tolist(), fillvalue=-1))
        for index, row in enumerate(batch.rows.tolist()):
            real = int(real_tokens(batch)[index].sum())
            of_row = tuple((place % width, label) for place, label in labels if place // width == index)
            rows.append((row, tuple(batch.input_ids[index, :real].tolist()), of_row))
    return sorted(rows)


def at_step(ranks: list[StepBatches], step: int) -> list[Batch]:
    return [batch for rank in ranks for batch in rank[step]]


@pytest.fixture(params=["packed", "by_sentence"])
def data(request: pytest.FixtureRequest) -> PreparedData:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("world_size", "accumulation", "options"),
    [
        (2, 1, {}),
        (4, 2, {}),
        (8, 1, {"soft_positions": 0.3}),
        (1, 8, {}),
        (2, 2, {"soft_positions": "all"}),
        (4, 1, {"masking": {"whole_word": True}}),
    ],
)
def test_same_rows_and_masks_on_any_number_of_ranks(
    data: PreparedData, world_size: int, accumulation: int, options: dict[str, Any]
) -> None:
    alone = steps(data, global_batch=16, world_size=1, **options)
    spread = steps(data, global_batch=16, world_size=world_size, accumulation=accumulation, **options)
    epoch = len(data.train) // 16
    for step in (0, 1, epoch - 1, epoch, epoch + 1, 5 * epoch):
        assert all(len(rank[step]) == accumulation for rank in spread)
        assert content(at_step(spread, step)) == content(at_step(alone, step))


def test_micro_batches_of_the_ranks_are_side_by_side(data: PreparedData) -> None:
    """Rows of like lengths are, so that no rank waits for another with longer rows."""
    [alone] = steps(data, global_batch=16, world_size=1)
    ranks = steps(data, global_batch=16, world_size=2, accumulation=2)
    for step in range(5):
        rows = [rank[step][accumulated].rows for accumulated in range(2) for rank in ranks]
        assert torch.equal(torch.cat(rows), alone[step][0].rows)


def test_each_row_once_an_epoch_and_an_epoch_may_end_inside_a_step(data: PreparedData) -> None:
    size = len(data.train)
    assert size % 16, "the corpus should not fill whole steps"
    ranks = steps(data, global_batch=16, world_size=2)
    rows = [row for step in range(2 * size // 16 + 1) for batch in at_step(ranks, step) for row in batch.rows.tolist()]
    counts = np.bincount(rows, minlength=size)
    assert counts.min() >= 2
    assert counts.sum() == (2 * size // 16 + 1) * 16
    assert ranks[0].epoch(size) == 16


def test_resume_in_the_middle_of_an_epoch(data: PreparedData) -> None:
    straight = steps(data, global_batch=8, world_size=2, soft_positions=0.3)
    middle = len(data.train) // 16
    consumed = straight[0].rows_consumed(middle)
    resumed = steps(data, global_batch=8, world_size=2, rows_before=consumed, first_step=middle, soft_positions=0.3)
    for step in range(middle, middle + 30):
        for rank in range(2):
            one, other = straight[rank][step][0], resumed[rank][step][0]
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.positions, other.positions)
            assert torch.equal(one.rows, other.rows)


def test_change_of_world_size_and_batch_in_the_middle(data: PreparedData) -> None:
    """However the stream is cut into steps, an epoch shows each row once, with the same masks."""
    straight = steps(data, global_batch=4, world_size=1)
    epoch_steps = -(-len(data.train) // 4)
    expected = content([batch for step in range(epoch_steps) for batch in at_step(straight, step)])
    changed: list[Batch] = []
    rows, step = 0, 0
    for world_size, global_batch, upto in ((1, 4, 20), (4, 8, 30), (2, 4, None)):
        ranks = steps(data, global_batch=global_batch, world_size=world_size, rows_before=rows, first_step=step)
        last = upto or step + (epoch_steps * 4 - rows) // 4
        changed += [batch for at in range(step, last) for batch in at_step(ranks, at)]
        rows, step = ranks[0].rows_consumed(last), last
    assert content(changed) == expected


def test_masks_differ_from_epoch_to_epoch_and_seed_to_seed(packed: PreparedData) -> None:
    size = len(packed.train)
    ranks = steps(packed, global_batch=1, world_size=1)
    first = {row: ids for row, ids, _ in content([ranks[0][step][0] for step in range(size)])}
    second = {row: ids for row, ids, _ in content([ranks[0][step][0] for step in range(size, 2 * size)])}
    other = steps(packed, global_batch=1, world_size=1, seed=8)
    seeded = {row: ids for row, ids, _ in content([other[0][step][0] for step in range(size)])}
    assert sum(first[row] != second[row] for row in first) > 0.95 * size
    assert sum(first[row] != seeded[row] for row in first) > 0.95 * size


def test_packed_batches_have_static_shapes(packed: PreparedData) -> None:
    rank = steps(packed, global_batch=8, world_size=1, soft_positions=0.3)[0]
    full = [batch for step in range(60) for batch in rank[step] if batch.token_count == 8 * 32]
    assert len(full) > 50
    assert {tuple(batch.input_ids.shape) for batch in full} == {(8, 32)}
    labels = round(0.15 * 30 + 1e-9)
    assert {len(batch.labels) for batch in full} == {8 * labels}
    assert {len(batch.positions) for batch in full} == {8 * (labels + round(0.3 * (32 - labels)))}


@pytest.mark.parametrize("global_batch", [16, 512])  # part of a block of like lengths, and two blocks
def test_sentence_batches_waste_little(by_sentence: PreparedData, global_batch: int) -> None:
    rank = steps(by_sentence, global_batch=global_batch, world_size=1, accumulation=global_batch // 8)[0]
    real = places = longest = 0
    for step in range(len(by_sentence.train) // global_batch):
        for batch in rank[step]:
            real, places = real + batch.token_count, places + batch.input_ids.numel()
            longest = max(longest, batch.input_ids.shape[1])
    plain = 1 - float(np.mean(by_sentence.train.lengths)) / longest
    assert 1 - real / places < 0.2 * plain


def test_batch_fields_agree(data: PreparedData) -> None:
    batch = steps(data, global_batch=8, world_size=1)[0][3][0]
    assert batch.input_ids.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
    assert batch.token_count == int(real_tokens(batch).sum())
    real, _ = data.train.rows(batch.rows.numpy(), batch.input_ids.shape[1])
    assert (batch.labels.numpy() == real.reshape(-1)[batch.positions.numpy()]).all()
    assert ((real != data.facts.pad_id) == real_tokens(batch).numpy()).all()


def test_workers_of_a_data_loader_give_the_same_batches(packed: PreparedData) -> None:
    rank = steps(packed, global_batch=8, world_size=2, soft_positions=0.3)[1]
    loader = DataLoader(rank, batch_size=None, sampler=range(5, 11), num_workers=2)
    loaded = list(loader)
    assert len(loaded) == 6
    for step, batches in zip(range(5, 11), loaded, strict=True):
        here = rank[step][0]
        for name in ("input_ids", "positions", "labels", "rows"):
            assert torch.equal(getattr(batches[0], name), getattr(here, name))
            assert getattr(batches[0], name).dtype == torch.int64
        assert torch.equal(real_tokens(batches[0]), real_tokens(here))
        assert batches[0].token_count == here.token_count
    copied = pickle.loads(pickle.dumps(rank))
    assert torch.equal(copied[7][0].input_ids, rank[7][0].input_ids)


def test_a_loader_draws_nothing_from_the_runs_random_numbers(packed: PreparedData) -> None:
    """A resume has another loader than the run that it continues, and must have the same dropout."""
    before = torch.get_rng_state()
    next(iter(step_loader(steps(packed, global_batch=8, world_size=1)[0], range(2), 0, pin_memory=False)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("number", ["TERM", "INT", "HUP"])
def test_a_signal_to_a_worker_of_the_loader_loses_no_batch(packed: PreparedData, number: str) -> None:
    """From another process than the one that loads, as a launcher or Slurm sends it to all processes of a run."""
    loader = iter(step_loader(steps(packed, global_batch=8, world_size=1)[0], range(9), 1, pin_memory=False))
    next(loader)
    [worker] = multiprocessing.active_children()
    for _ in range(8):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
        next(loader)
    assert worker.is_alive()
    # The kernel would drop the parent's signal beside one that is still pending.
    while is_pending(worker.pid, signal.SIGTERM):
        time.sleep(0.01)
    worker.terminate()
    worker.join(60)
    ended = worker.exitcode
    worker.kill()  # Python would wait for it forever
    assert ended == 0, "its parent still ends it"


def is_pending(pid: int | None, number: signal.Signals) -> bool:
    [mask] = re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_validation_is_the_same_for_any_world_size(data: PreparedData, world_size: int) -> None:
    def batches(rank: int, ranks: int, max_rows: int | None = None) -> list[Batch]:
        return list(
            validation_batches(
                data.validation,
                data.facts,
                DataConfig(),
                micro_batch_size=8,
                rank=rank,
                world_size=ranks,
                max_rows=max_rows,
            )
        )

    alone = batches(0, 1)
    spread = [batches(rank, world_size) for rank in range(world_size)]
    assert len({len(of_rank) for of_rank in spread}) == 1
    assert content([batch for of_rank in spread for batch in of_rank]) == content(alone)
    assert sorted(row for row, *_ in content(alone)) == list(range(len(data.validation)))
    fillers = [batch for of_rank in spread for batch in of_rank if batch.token_count == 0]
    assert all(len(batch.labels) == 0 and real_tokens(batch).any() for batch in fillers)

    some, size = content(batches(0, 1, max_rows=10)), len(data.validation)
    assert [row for row, *_ in some] == [nth * size // 10 for nth in range(10)], "spread evenly"
    assert set(some) <= set(content(alone))
    assert content(batches(0, 1, max_rows=size + 10)) == content(alone)


def test_the_mask_is_left_out_only_where_there_is_no_padding(data: PreparedData) -> None:
    rank = steps(data, global_batch=4, world_size=1)[0]
    batches = [batch for step in range(len(data.train) // 4) for batch in rank[step]]
    padded = [batch.token_count < batch.input_ids.numel() for batch in batches]
    assert [batch.attention_mask is not None for batch in batches] == padded
    assert True in padded
    assert False in padded


MASKINGS = [{}, {"whole_word": True}, {"label_draw": "bernoulli"}, {"label_draw": "bernoulli", "whole_word": True}]


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("positions", ["all", 0.3, 0.999, 0.01])
def test_further_positions_are_unlabelled_real_tokens_after_the_same_masks(
    data: PreparedData, positions: Any, masking: dict[str, Any]
) -> None:
    plain = steps(data, global_batch=4, world_size=1, masking=masking)[0]
    [dense] = steps(data, global_batch=4, world_size=1, masking=masking, soft_positions=positions)
    for step in range(20):
        [few], [many] = plain[step], pickle.loads(pickle.dumps(dense[step]))
        assert torch.equal(few.input_ids, many.input_ids)
        assert torch.equal(few.labels, many.labels)
        [alone] = dense.without_teacher()[step]
        assert torch.equal(few.positions, alone.positions)
        assert (alone.soft_rows, many.soft_rows) == (len(few.labels), len(many.positions))
        further = many.positions[len(many.labels) :]
        assert (further.diff() > 0).all()
        assert not torch.isin(further, few.positions).any()
        real = real_tokens(many)
        assert real.flatten()[further].all()
        if positions == "all":
            assert len(many.positions) == many.token_count
            continue
        lengths, width = real.sum(1), real.shape[1]
        labels = torch.tensor([max(1, math.floor(0.15 * (int(n) - 2) + 0.5)) for n in lengths])
        wanted = torch.tensor([math.floor(positions * int(n) + 0.5) for n in lengths - labels])
        left = lengths - torch.bincount(few.positions // width, minlength=4)
        assert torch.equal(torch.bincount(further // width, minlength=4), torch.minimum(wanted, left))


def test_a_batch_moves_with_all_that_the_models_read(by_sentence: PreparedData) -> None:
    rank = steps(by_sentence, global_batch=8, world_size=1)[0]
    batch = next(batch for step in range(100) for batch in rank[step] if batch.attention_mask is not None)
    moved = batch.to(torch.device("meta"))
    assert moved.attention_mask is not None
    tensors = (moved.input_ids, moved.attention_mask, moved.positions, moved.labels)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.rows.device.type == "cpu"
    assert moved.token_count == batch.token_count


def test_a_batch_is_pinned_before_it_moves_to_a_gpu(packed: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation has no loader that pins; the host would wait for each copy."""
    pinned, moved = list[int](), list[int]()

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.append(id(copy))
        return copy

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        assert device.type == "cuda"
        assert non_blocking
        moved.append(id(tensor))
        return tensor

    rank = steps(packed, global_batch=8, world_size=1)[0]
    (batch,) = rank[0]
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    there = batch.to(torch.device("cuda"))
    assert pinned == moved == [id(each) for each in (there.input_ids, there.positions, there.labels)]
