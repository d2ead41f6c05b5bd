"""Micro-batches with their masks: what each rank trains on at each step, and what all ranks evaluate on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dwt_ds.config.objective import SoftPositions
from dwt_ds.config.schema import DataConfig
from dwt_ds.data.masks import continues_word, draw_further, draw_masks
from dwt_ds.data.rows import RowStream, RowTable
from dwt_ds.data.teacher_rows import TeacherRows, TeacherTokens
from dwt_ds.data.tensors import as_bytes, attention_mask, int64, on_device
from dwt_ds.data.tokenizer import TokenizerFacts

# Masks of the validation rows never change, whatever the seed of the run.
_VALIDATION_SEED = 20_201_120


class Batch(NamedTuple):
    """One micro-batch for the models and the loss: B rows of S columns, N positions that reach the head."""

    input_ids: Tensor
    """(B, S) int64, masked."""
    attention_mask: Tensor | None
    """(B, S) int64, 1 on real tokens; None if there is no padding."""
    positions: Tensor
    """(N,) int64, flat indices into B x S: of the labelled tokens, ascending, then of the further tokens that only the
    soft loss sees, ascending."""
    labels: Tensor
    """(L,) int64, the true tokens at the first L positions."""
    token_count: int
    """Real (non-pad) tokens."""
    rows: Tensor
    """(B,) int64, ids of the rows in the table; always on the CPU."""
    teacher: TeacherRows | None = None
    """The rows as a teacher with another vocabulary reads them; None for a teacher with the student's."""

    @property
    def soft_rows(self) -> int:
        """Positions that the soft loss sees."""
        return int(self.positions.numel() if self.teacher is None else self.teacher.aligned.numel())

    @property
    def hidden_rows(self) -> int:
        """Hidden states that the hidden loss compares: tokens, or the words that both vocabularies' rows have."""
        return self.token_count if self.teacher is None else self.teacher.words.total

    def to(self, device: torch.device) -> Batch:
        """The same with the tensors that the models need on `device`; `rows` stays on the CPU."""
        ids, mask, positions, labels = on_device(device, self[:4])
        return Batch(ids, mask, positions, labels, self.token_count, self.rows, on_device(device, self.teacher))

    def __reduce__(self) -> tuple[Any, ...]:
        return as_bytes(self)


def _batch(
    input_ids: np.ndarray,
    lengths: np.ndarray,
    positions: np.ndarray,
    labels: np.ndarray,
    token_count: int,
    rows: np.ndarray,
    teacher: TeacherRows | None = None,
) -> Batch:
    mask = attention_mask(lengths, input_ids.shape[1])
    rows_as_tensor = torch.from_numpy(rows)
    return Batch(int64(input_ids), mask, int64(positions), int64(labels), token_count, rows_as_tensor, teacher)


@dataclass(eq=False)
class _BatchMaker:
    """Makes micro-batches from the rows of a table."""

    table: RowTable
    facts: TokenizerFacts
    config: DataConfig
    """How tokens are masked."""
    seed: int
    soft_positions: SoftPositions = "labelled"
    teacher_tokens: TeacherTokens | None = None
    """For a teacher with another vocabulary: batches then have its rows, too. Requires soft_positions="labelled"."""

    def __post_init__(self) -> None:
        assert self.teacher_tokens is None or self.soft_positions == "labelled"  # refused with the settings
        wants_words = [("data.whole_word=true", "data.whole_word=false")] if self.config.whole_word else []
        if self.teacher_tokens is not None:
            wants_words.append(("teacher.vocabulary=shared", "teacher.vocabulary=same"))
        if wants_words and not self.table.knows_words and self.facts.continues_word is None:
            setting, other = wants_words[0]
            raise ValueError(
                f"{setting}: this data folder does not say where words start, nor does its tokenizer: "
                f'make the folder again with this version of "dwt-ds prepare", or set {other}'
            )

    def batch(self, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        """The micro-batch of rows (B,) int64, with the masks of their epochs (B,) int64."""
        input_ids, lengths = self.table.rows(rows, self._width(rows))
        starts_word = None
        if self.config.whole_word and self.table.knows_words:
            starts_word = self.table.starts_word(rows, input_ids.shape[1])
        masked = draw_masks(input_ids, lengths, rows, epochs, self.facts, self.config, self.seed, starts_word)
        positions = masked.positions
        teacher = self._teacher_rows(rows, input_ids, lengths, positions, masked.input_ids.reshape(-1)[positions])
        if self.soft_positions != "labelled":
            share = self.config.mask_probability, self.soft_positions
            positions = np.concatenate([positions, draw_further(masked, lengths, rows, epochs, *share, self.seed)])
        return _batch(masked.input_ids, lengths, positions, masked.labels, int(lengths.sum()), rows, teacher)

    def without_labels(self, rows: np.ndarray) -> Batch:
        """A micro-batch that adds nothing to any sum."""
        input_ids, lengths = self.table.rows(rows, self._width(rows))
        none = np.zeros(0, dtype=np.int64)
        teacher = self._teacher_rows(rows, input_ids, lengths, none, none)
        return _batch(input_ids, lengths, none, none, 0, none, teacher)

    def _teacher_rows(
        self, rows: np.ndarray, input_ids: np.ndarray, lengths: np.ndarray, labelled: np.ndarray, shown: np.ndarray
    ) -> TeacherRows | None:
        """labelled: (N,) int64, flat indices into the rows' tokens, ascending; shown: (N,), what is seen there."""
        if self.teacher_tokens is None:
            return None
        known = self.table.knows_words
        starts = self.table.starts_word(rows, input_ids.shape[1]) if known else ~continues_word(input_ids, self.facts)
        packed = self.table.full_width is not None
        return self.teacher_tokens.rows(input_ids, lengths, labelled, shown, starts, continued=packed)

    def _width(self, rows: np.ndarray) -> int:
        return self.table.full_width or int(self.table.lengths[rows].max())


@dataclass(eq=False)
class StepBatches(_BatchMaker, Dataset[list[Batch]]):
    """Item k: this rank's micro-batches of step k, one for each accumulation step.

    Step k takes the next `micro_batch_size * accumulation * world_size` rows of an endless stream of epochs, starting
    at stream position `rows_before + (k - first_step) * global batch`. Which rows and masks a step has depends on the
    seed and on that position alone, not on the number of ranks (at equal global batch) or on where a run resumed. An
    epoch may end inside a step. Rows of different lengths (one sentence a row) are grouped by length.
    """

    _: KW_ONLY
    micro_batch_size: int
    accumulation: int
    rank: int
    world_size: int
    rows_before: int = 0
    """Stream positions consumed before step `first_step`."""
    first_step: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.global_batch_size = self.micro_batch_size * self.accumulation * self.world_size
        self._stream = RowStream(len(self.table), self.seed, None if self.table.full_width else self.table.lengths)

    def without_teacher(self) -> StepBatches:
        """The same rows and masks for a student that trains alone: with the labelled positions only."""
        return replace(self, soft_positions="labelled", teacher_tokens=None)

    def rows_consumed(self, step: int) -> int:
        """Stream positions consumed before step `step`: what a checkpoint must keep to resume."""
        return self.rows_before + (step - self.first_step) * self.global_batch_size

    def epoch(self, step: int) -> float:
        """Epochs completed before step `step`."""
        return self.rows_consumed(step) / self._stream.size

    def __getitem__(self, step: int) -> list[Batch]:
        start = self.rows_consumed(step)
        rows, epochs = self._stream.at(np.arange(start, start + self.global_batch_size))
        batches = []
        for accumulation_step in range(self.accumulation):
            first = (accumulation_step * self.world_size + self.rank) * self.micro_batch_size
            here = slice(first, first + self.micro_batch_size)
            batches.append(self.batch(rows[here], epochs[here]))
        return batches


def step_loader(batches: StepBatches, steps: range, workers: int, *, pin_memory: bool) -> DataLoader[list[Batch]]:
    """Loads `steps` in order, in `workers` processes (0: in this one); only this process and SIGKILL end those early.

    It has a generator of its own: drawing from the global one would change the dropout after a resume.
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_end_only_for_the_parent,
    )


def _end_only_for_the_parent(_worker: int) -> None:
    """Make this worker outlive the signals that ask a run to stop.

    A launcher, Slurm or a terminal sends them to all processes of a run. A rank still has some steps to take before it
    saves, and torch ends a rank whose worker has died.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True, name="end of the worker").start()


def validation_batches(
    table: RowTable,
    facts: TokenizerFacts,
    config: DataConfig,
    *,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_rows: int | None = None,
    teacher_tokens: TeacherTokens | None = None,
) -> Iterator[Batch]:
    """This rank's share of the validation rows, with the same masks for every run and number of ranks.

    At most `max_rows` rows, spread evenly over the table. Every rank yields the same number of batches; a rank that has
    no rows left yields one row without labels (token_count 0), which adds nothing to any sum.
    """
    maker = _BatchMaker(table, facts, config, _VALIDATION_SEED, teacher_tokens=teacher_tokens)
    count = len(table) if max_rows is None else min(len(table), max_rows)
    rows = np.arange(count, dtype=np.int64) * len(table) // max(count, 1)
    if table.full_width is None:
        rows = rows[np.argsort(table.lengths[rows], kind="stable")]
    for first in range(0, -(-count // micro_batch_size), world_size):
        mine = (first + rank) * micro_batch_size
        here = rows[mine : mine + micro_batch_size]
        yield maker.batch(here, np.zeros_like(here)) if len(here) else maker.without_labels(rows[:1])
