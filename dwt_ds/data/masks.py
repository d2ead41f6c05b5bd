"""Masked-language-model masks, drawn on the fly as a pure function of (seed, epoch, row).

Which tokens become labels and what the model sees in their place: Devlin et al. 2019 (BERT), appendix A.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.hashing import below, hashes, key_of, uniform
from dwt_ds.data.tokenizer import TokenizerFacts

_MASK_STREAM = 3
_CHOICE, _ACTION, _REPLACEMENT = 0, 1, 2
_NEVER = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class MaskedRows:
    """Rows as the model sees them, and what it must say."""

    input_ids: np.ndarray
    """(B, S) int64, masked."""
    positions: np.ndarray
    """(N,) int64: flat indices into B*S of the labelled tokens, ascending."""
    labels: np.ndarray
    """(N,) int64: the true tokens at `positions`."""


def draw_masks(
    input_ids: np.ndarray,
    lengths: np.ndarray,
    rows: np.ndarray,
    epochs: np.ndarray,
    facts: TokenizerFacts,
    config: DataConfig,
    seed: int,
) -> MaskedRows:
    """Mask a batch. Special tokens, padding and the unknown token are never labelled.

    With `label_draw="fixed"` every row of n tokens gets round(mask_probability * (n - 2)) labels; with whole words, a
    word that would exceed that number is skipped and the next one tried.

    Args:
        input_ids: (B, S) int64.
        lengths: (B,) real tokens of each row.
        rows: (B,) int64; with `epochs` and `seed` they decide every draw, so a row is masked alike in any batch.
        epochs: (B,) int64.
        facts: of the tokenizer.
        config: probability, shares, label draw and whole words.
        seed: of the run.
    """
    row_keys = hashes(hashes(key_of(_MASK_STREAM, seed), epochs), rows)[:, None]
    columns = np.arange(input_ids.shape[1], dtype=np.uint64)[None, :]
    maskable = ~facts.is_special[input_ids] & (columns < lengths[:, None].astype(np.uint64))

    choice = hashes(hashes(row_keys, np.full(1, _CHOICE)), columns)
    word_of_token = _words(input_ids, maskable, facts) if config.whole_word else None
    if word_of_token is not None:
        choice = np.take_along_axis(choice, word_of_token, axis=1)
    if config.label_draw == "bernoulli":
        chosen = maskable & (uniform(choice) < config.mask_probability)
    else:
        wanted = np.minimum(labels_by_length(lengths, config.mask_probability), maskable.sum(axis=1))
        if word_of_token is None:
            chosen = _lowest(np.where(maskable, choice, _NEVER), wanted)
        else:
            chosen = _lowest_words(choice, word_of_token, maskable, wanted)

    positions = np.flatnonzero(chosen)
    labels = input_ids.reshape(-1)[positions]
    counters = positions % input_ids.shape[1]
    keys = row_keys[positions // input_ids.shape[1], 0]
    action = uniform(hashes(hashes(keys, np.full(1, _ACTION)), counters))
    ordinary = facts.ordinary_ids
    replacement = ordinary[below(hashes(hashes(keys, np.full(1, _REPLACEMENT)), counters), len(ordinary))]
    shown = np.where(action < config.mask_share + config.random_share, replacement, labels)
    shown = np.where(action < config.mask_share, facts.mask_id, shown)
    masked = input_ids.copy()
    masked.reshape(-1)[positions] = shown
    return MaskedRows(masked, positions, labels)


def labels_by_length(lengths: np.ndarray, probability: float) -> np.ndarray:
    """Labelled tokens of rows with `lengths` (B,) real tokens, at least 1: (B,) int64.

    The outer two special tokens are not counted, so every full row has the same number, wherever documents meet in it.
    """
    return np.maximum(np.floor(probability * np.maximum(lengths.astype(np.int64) - 2, 0) + 0.5).astype(np.int64), 1)


def _lowest(choice: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(B, S) bool: the `wanted` (B,) lowest words of each row."""
    ordered = np.sort(choice, axis=1)
    last = np.take_along_axis(ordered, np.maximum(wanted - 1, 0)[:, None], axis=1)
    return (choice <= last) & (wanted > 0)[:, None]


def _words(input_ids: np.ndarray, maskable: np.ndarray, facts: TokenizerFacts) -> np.ndarray:
    """(B, S) int64: for each token the column at which its word starts."""
    after_maskable = np.zeros_like(maskable)
    after_maskable[:, 1:] = maskable[:, :-1]
    starts = ~(maskable & after_maskable & facts.continues_word[input_ids])
    columns = np.arange(input_ids.shape[1], dtype=np.int64)[None, :]
    return np.maximum.accumulate(np.where(starts, columns, 0), axis=1)


def _lowest_words(
    choice: np.ndarray, word_of_token: np.ndarray, maskable: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """(B, S) bool: whole words in the order of their draw, each taken if it still fits into `wanted` (B,) tokens."""
    batch, width = choice.shape
    flat_word = word_of_token + np.arange(batch)[:, None] * width
    sizes = np.bincount(flat_word[maskable], minlength=batch * width).reshape(batch, width)
    order = np.argsort(np.where(sizes > 0, choice, _NEVER), axis=1, kind="stable")
    taken = np.zeros((batch, width), dtype=bool)
    room = wanted.copy()
    every = np.arange(batch)
    for nth in range(int((sizes > 0).sum(axis=1).max(initial=0))):
        word = order[:, nth]
        size = sizes[every, word]
        take = (size > 0) & (size <= room)
        taken[every[take], word[take]] = True
        room -= np.where(take, size, 0)
    return np.take_along_axis(taken, word_of_token, axis=1) & maskable
