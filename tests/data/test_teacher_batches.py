"""Batches with rows for a teacher with a tokenizer of its own."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from harness.teacher_rows import Pair
from torch.utils.data import DataLoader

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.batches import Batch, validation_batches
from dwt_ds.data.teacher_rows import CommonWords, TeacherRows


def test_the_students_batches_are_the_same_with_a_teacher(one: Pair) -> None:
    for step in range(30):
        without = one.batches().without_teacher()[step]
        for ours, plain, after in zip(one.batches()[step], one.batches(teacher=False)[step], without, strict=True):
            assert plain.teacher is None
            assert_equal(after, plain)
            assert ours.teacher is not None
            assert len(ours.teacher.input_ids) == len(ours.input_ids)
            assert_equal(ours._replace(teacher=None), plain)
    options: dict[str, Any] = {"micro_batch_size": 4, "rank": 0, "world_size": 1}
    arguments = one.data.validation, one.data.facts, DataConfig()
    held_out = list(validation_batches(*arguments, **options, teacher_tokens=one.tokens))
    for ours, plain in zip(held_out, validation_batches(*arguments, **options), strict=True):
        assert ours.teacher is not None
        assert_equal(ours._replace(teacher=None), plain)


def test_a_rank_without_rows_has_teacher_rows_without_positions(one: Pair) -> None:
    options: dict[str, Any] = {"micro_batch_size": 4, "world_size": 64, "rank": 63, "teacher_tokens": one.tokens}
    [batch] = validation_batches(one.data.validation, one.data.facts, DataConfig(), **options)
    assert batch.token_count == 0
    assert batch.teacher is not None
    assert batch.teacher.input_ids.shape[0] == 1
    assert len(batch.teacher.positions) == len(batch.teacher.aligned) == 0


def test_a_loader_process_makes_the_same_batches(one: Pair) -> None:
    steps = one.batches()
    loader = DataLoader(steps, batch_size=None, sampler=range(4, 8), num_workers=1)  # type: ignore[arg-type]
    copied = pickle.loads(pickle.dumps(steps))
    for step, loaded in zip(range(4, 8), loader, strict=True):
        for here, there, again in zip(steps[step], loaded, copied[step], strict=True):
            assert_equal(here, there)
            assert_equal(here, again)
            assert there.teacher.input_ids.dtype == there.teacher.aligned.dtype == torch.int64


def test_a_batch_moves_with_its_teacher_rows(one: Pair) -> None:
    moved = one.batches()[0][0].to(torch.device("meta")).teacher
    assert moved is not None
    tensors = [*moved[:-1], moved.words.ours, moved.words.theirs]
    assert {each.device.type for each in tensors if each is not None} == {"meta"}


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, (Batch, TeacherRows, CommonWords)):
        for ours, theirs in zip(one, other, strict=True):
            assert_equal(ours, theirs)
    else:
        assert one == other


def test_old_folders_without_words_need_wordpiece(pairs: Any, one: Pair) -> None:
    bpe = pairs("byte-level BPE to Unigram")
    known = one.batches()[0][0]
    for pair in (one, bpe):
        pair.data.train.knows_words = False
    try:
        assert_equal(one.batches()[0][0], known)
        with pytest.raises(ValueError, match="vocabulary=shared: this data folder does not say where words start"):
            bpe.batches()
    finally:
        for pair in (one, bpe):
            pair.data.train.knows_words = True
