"""Micro-batches with their masks: what each rank trains on at each step, and what all ranks validate on.

Legend: B rows of a micro-batch, S columns, N labelled tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dwt_ds.data.masks import Masking, draw_masks
from dwt_ds.data.order import RowStream
from dwt_ds.data.prepared import RowTable
from dwt_ds.data.tokenizer import TokenizerFacts

# Masks of the validation rows never change, whatever the seed of the run.
_VALIDATION_SEED = 20_201_120


@dataclass
class Batch:
    """One micro-batch, torch tensors."""

    input_ids: torch.Tensor
    """(B, S) int64, already masked."""
    attention_mask: torch.Tensor
    """(B, S) int64: 1 on real tokens."""
    positions: torch.Tensor
    """(N,) int64: flat indices into B*S of the labelled tokens, ascending."""
    labels: torch.Tensor
    """(N,) int64: the true tokens at `positions`."""
    token_count: int
    """Real (non-pad) tokens."""
    rows: torch.Tensor
    """(B,) int64: ids of the rows, for replay. Stays on the CPU."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels from worker processes as plain bytes of half the size: a tensor would cost a file descriptor and a
        shared memory segment each, more than making the batch."""
        lengths = self.attention_mask.sum(dim=1)
        tensors = (self.input_ids, lengths, self.positions, self.labels)
        return _unpacked, (*(tensor.to(torch.int32).numpy() for tensor in tensors), self.rows.numpy(), self.token_count)

    def pin_memory(self) -> Batch:
        return Batch(
            self.input_ids.pin_memory(),
            self.attention_mask.pin_memory(),
            self.positions.pin_memory(),
            self.labels.pin_memory(),
            self.token_count,
            self.rows,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.attention_mask.to(device, non_blocking=non_blocking),
            self.positions.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.token_count,
            self.rows,
        )


def _unpacked(
    input_ids: np.ndarray,
    lengths: np.ndarray,
    positions: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    token_count: int,
) -> Batch:
    return Batch(
        torch.from_numpy(input_ids.astype(np.int64)),
        _attention_mask(lengths, input_ids.shape[1]),
        torch.from_numpy(positions.astype(np.int64)),
        torch.from_numpy(labels.astype(np.int64)),
        token_count,
        torch.from_numpy(rows),
    )


def _attention_mask(lengths: np.ndarray, width: int) -> torch.Tensor:
    return torch.from_numpy((np.arange(width)[None, :] < lengths[:, None]).astype(np.int64))


def _masked_batch(
    table: RowTable,
    facts: TokenizerFacts,
    masking: Masking,
    seed: int,
    rows: np.ndarray,
    epochs: np.ndarray,
    width: int,
) -> Batch:
    input_ids, lengths = table.rows(rows, width)
    masked = draw_masks(input_ids, lengths, rows, epochs, facts, masking, seed)
    return Batch(
        torch.from_numpy(masked.input_ids),
        _attention_mask(lengths, width),
        torch.from_numpy(masked.positions),
        torch.from_numpy(masked.labels),
        int(lengths.sum()),
        torch.from_numpy(rows),
    )


class StepBatches(Dataset[list[Batch]]):
    """Item k: this rank's micro-batches of step k, one for each accumulation step.

    Step k takes the next `micro_batch_size * accumulation * world_size` rows of an endless stream of epochs, starting
    at stream position `rows_before + (k - first_step) * global batch`. Which rows and masks a step has depends on the
    seed and on that position alone: not on the number of ranks (at equal global batch), nor on where a run resumed.
    An epoch's end may fall inside a step. Rows of many lengths (one sentence a row) are grouped by length.
    """

    def __init__(
        self,
        table: RowTable,
        facts: TokenizerFacts,
        *,
        seed: int,
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        masking: Masking,
        rows_before: int = 0,
        first_step: int = 0,
    ) -> None:
        """rows_before: stream positions consumed before step `first_step`. Raises ValueError for a table smaller
        than one global batch."""
        self.global_batch_size = micro_batch_size * accumulation * world_size
        if len(table) < self.global_batch_size:
            raise ValueError(
                f"the data folder has {len(table)} training rows, fewer than one global batch of "
                f"{self.global_batch_size} (micro-batch {micro_batch_size} x accumulation {accumulation} x "
                f"{world_size} ranks): prepare more text, or lower train.micro_batch_size"
            )
        self._table = table
        self._facts = facts
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._accumulation = accumulation
        self._rank = rank
        self._world_size = world_size
        self._masking = masking
        self._rows_before = rows_before
        self._first_step = first_step
        self._stream = RowStream(len(table), seed, None if table.full_width else table.lengths)

    def rows_consumed(self, step: int) -> int:
        """Stream positions consumed before step `step`: what a checkpoint must keep to resume."""
        return self._rows_before + (step - self._first_step) * self.global_batch_size

    def epoch(self, step: int) -> float:
        """Epochs completed before step `step`."""
        return self.rows_consumed(step) / len(self._table)

    def __getitem__(self, step: int) -> list[Batch]:
        start = self.rows_consumed(step)
        rows, epochs = self._stream.at(np.arange(start, start + self.global_batch_size))
        batches = []
        for accumulation_step in range(self._accumulation):
            first = (accumulation_step * self._world_size + self._rank) * self._micro_batch_size
            here = slice(first, first + self._micro_batch_size)
            width = self._table.full_width or int(self._table.lengths[rows[here]].max())
            batches.append(
                _masked_batch(self._table, self._facts, self._masking, self._seed, rows[here], epochs[here], width)
            )
        return batches


def validation_batches(
    table: RowTable,
    facts: TokenizerFacts,
    *,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    masking: Masking,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """This rank's share of the validation rows, with masks that are the same for every run and number of ranks.

    At most `max_rows` rows, spread evenly over the table. Every rank yields the same number of batches; one that has
    none left yields a row without labels (token_count 0), which adds nothing to any sum.
    """
    count = len(table) if max_rows is None else min(len(table), max_rows)
    rows = np.arange(count, dtype=np.int64) * len(table) // max(count, 1)
    if table.full_width is None:
        rows = rows[np.argsort(table.lengths[rows], kind="stable")]
    micro_batches = -(-count // micro_batch_size)
    for first in range(0, micro_batches, world_size):
        mine = (first + rank) * micro_batch_size
        here = rows[mine : mine + micro_batch_size]
        if len(here) == 0:
            yield _without_labels(table, table.full_width or int(table.lengths[rows[0]]), rows[:1])
            continue
        width = table.full_width or int(table.lengths[here].max())
        yield _masked_batch(table, facts, masking, _VALIDATION_SEED, here, np.zeros_like(here), width)


def _without_labels(table: RowTable, width: int, row: np.ndarray) -> Batch:
    input_ids, lengths = table.rows(row, width)
    none = torch.zeros(0, dtype=torch.int64)
    mask = _attention_mask(lengths, width)
    return Batch(torch.from_numpy(input_ids), mask, none, none.clone(), 0, none.clone())
