"""Masked-language-model masks, drawn on the fly as a pure function of (seed, epoch, row).

Which tokens are labelled and what the model sees in their place: Devlin et al. 2019 (BERT), appendix A.1; and which
further tokens the soft loss sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dwt_ds.config.objective import SoftPositions
from dwt_ds.config.schema import DataConfig
from dwt_ds.data.row_hashes import below, hashes, key_of, uniform
from dwt_ds.data.tensors import is_real
from dwt_ds.data.tokenizer import TokenizerFacts

_MASK_STREAM = 3
_CHOICE, _ACTION, _REPLACEMENT, _FURTHER = 0, 1, 2, 3
_NEVER = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class MaskedRows:
    """Rows as the model sees them, with their labels."""

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
    starts_word: np.ndarray | None = None,
) -> MaskedRows:
    """Mask a batch. Special tokens, padding and the unknown token are never labelled.

    With `label_draw="fixed"`, every row of n tokens gets round(mask_probability * (n - 2)) labels. With whole words, a
    word that would exceed that number is skipped and the next one tried; if none fits, a run of that number of tokens
    of one word is labelled. With "bernoulli", the tokens of a row that is one word, longer than that number, are drawn
    one by one.

    Args:
        input_ids: (B, S) int64.
        lengths: (B,) real tokens of each row.
        rows: (B,) int64; they decide every draw with `epochs` and `seed`, so a row has the same mask in any batch.
        epochs: (B,) int64.
        starts_word: (B, S) bool: the tokens that start a word, from the data folder; None: use the vocabulary's
            (`facts.continues_word`). Only needed for whole words.
    """
    row_keys = _row_keys(rows, epochs, seed)
    maskable = ~facts.is_special[input_ids] & is_real(lengths, input_ids.shape[1])

    choice = _draws(row_keys, _CHOICE, np.arange(input_ids.shape[1])[None, :])
    wanted = np.minimum(labels_by_length(lengths, config.mask_probability), maskable.sum(axis=1))
    word_of_token = None
    if config.whole_word:
        word_of_token = _words(maskable, continues_word(input_ids, facts) if starts_word is None else ~starts_word)
        of_word = np.take_along_axis(choice, word_of_token, axis=1)
    if config.label_draw == "bernoulli":
        if word_of_token is not None:
            choice = np.where(_is_one_long_word(word_of_token, maskable, wanted)[:, None], choice, of_word)
        chosen = maskable & (uniform(choice) < config.mask_probability)
    elif word_of_token is None:
        chosen = _lowest(np.where(maskable, choice, _NEVER), wanted)
    else:
        chosen = _lowest_words(of_word, word_of_token, maskable, wanted)

    positions = np.flatnonzero(chosen)
    labels = input_ids.reshape(-1)[positions]
    counters = positions % input_ids.shape[1]
    keys = row_keys[positions // input_ids.shape[1], 0]
    action = uniform(_draws(keys, _ACTION, counters))
    ordinary = facts.ordinary_ids
    replacement = ordinary[below(_draws(keys, _REPLACEMENT, counters), len(ordinary))]
    shown = np.where(action < config.mask_share + config.random_share, replacement, labels)
    shown = np.where(action < config.mask_share, facts.mask_id, shown)
    masked = input_ids.copy()
    masked.reshape(-1)[positions] = shown
    return MaskedRows(masked, positions, labels)


def labels_by_length(lengths: np.ndarray, probability: float) -> np.ndarray:
    """Labelled tokens of rows with `lengths` (B,) real tokens, at least 1: (B,) int64.

    The outer two special tokens are not counted. Every full row has the same number, wherever documents meet in it.
    """
    return np.maximum(np.floor(probability * (lengths.astype(np.int64) - 2) + 0.5).astype(np.int64), 1)


def draw_further(
    masked: MaskedRows,
    lengths: np.ndarray,
    rows: np.ndarray,
    epochs: np.ndarray,
    mask_probability: float,
    soft_positions: SoftPositions,
    seed: int,
) -> np.ndarray:
    """Unlabelled real tokens, also special ones, that the soft loss sees: (M,) int64 flat indices, ascending.

    Labels and masks do not depend on them. `masked` is from `draw_masks`, whose other arguments are the same here;
    `further_by_length` says how many tokens there are.
    """
    free = is_real(lengths, masked.input_ids.shape[1])
    free.reshape(-1)[masked.positions] = False
    if soft_positions != "all":
        wanted = np.minimum(further_by_length(lengths, mask_probability, soft_positions), free.sum(axis=1))
        choice = _draws(_row_keys(rows, epochs, seed), _FURTHER, np.arange(free.shape[1])[None, :])
        free = _lowest(np.where(free, choice, _NEVER), wanted)
    return np.flatnonzero(free)


def further_by_length(lengths: np.ndarray, mask_probability: float, soft_positions: SoftPositions) -> np.ndarray:
    """Unlabelled tokens that the soft loss sees in rows with `lengths` (B,) real tokens: (B,) int64.

    A share is of the real tokens minus `labels_by_length`, rounded. It does not depend on how many labels were drawn,
    so every full row has the same number.
    """
    if soft_positions == "labelled":
        return np.zeros(lengths.shape, dtype=np.int64)
    others = lengths.astype(np.int64) - labels_by_length(lengths, mask_probability)
    return others if soft_positions == "all" else np.floor(soft_positions * others + 0.5).astype(np.int64)


def _row_keys(rows: np.ndarray, epochs: np.ndarray, seed: int) -> np.ndarray:
    """(B, 1) uint64: the key of all draws of a row in an epoch."""
    return hashes(hashes(key_of(_MASK_STREAM, seed), epochs), rows)[:, None]


def _draws(keys: np.ndarray, purpose: int, counters: np.ndarray) -> np.ndarray:
    """uint64 random numbers for a purpose, such as _CHOICE, in the broadcast shape of keys and counters."""
    return hashes(hashes(keys, np.full(1, purpose)), counters)


def _lowest(choice: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(B, S) bool: the `wanted` (B,) lowest draws of each row."""
    ordered = np.sort(choice, axis=1)
    last = np.take_along_axis(ordered, np.maximum(wanted - 1, 0)[:, None], axis=1)
    return (choice <= last) & (wanted > 0)[:, None]


def continues_word(input_ids: np.ndarray, facts: TokenizerFacts) -> np.ndarray:
    """(B, S) bool: tokens that continue a word, by their entries in the vocabulary."""
    assert facts.continues_word is not None  # checked when the batches were set up
    return facts.continues_word[input_ids]


def _words(maskable: np.ndarray, continues_word: np.ndarray) -> np.ndarray:
    """(B, S) int64: the column at which each token's word starts; special tokens end words."""
    after_maskable = np.zeros_like(maskable)
    after_maskable[:, 1:] = maskable[:, :-1]
    starts = ~(maskable & after_maskable & continues_word)
    columns = np.arange(maskable.shape[1], dtype=np.int64)[None, :]
    return np.maximum.accumulate(np.where(starts, columns, 0), axis=1)


def _lowest_words(
    choice: np.ndarray, word_of_token: np.ndarray, maskable: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """(B, S) bool: whole words in the order of their draw, each taken if it still fits into `wanted` (B,) tokens; if
    none fits, a run of `wanted` tokens of the first word."""
    batch, width = choice.shape
    sizes = _sizes(word_of_token, maskable)
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
    chosen = np.take_along_axis(taken, word_of_token, axis=1) & maskable
    for row in np.flatnonzero((room == wanted) & (wanted > 0)).tolist():
        column = int(order[row, 0])
        start = column + int(choice[row, column]) % int(sizes[row, column] - wanted[row] + 1)
        chosen[row, start : start + wanted[row]] = True
    return chosen


def _sizes(word_of_token: np.ndarray, maskable: np.ndarray) -> np.ndarray:
    """(B, S) int64: tokens of the word that starts in each column, 0 if none does."""
    batch, width = maskable.shape
    flat_word = word_of_token + np.arange(batch)[:, None] * width
    return np.bincount(flat_word[maskable], minlength=batch * width).reshape(batch, width)


def _is_one_long_word(word_of_token: np.ndarray, maskable: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(B,) bool: rows that consist of one word of more than `wanted` (B,) tokens."""
    longest = _sizes(word_of_token, maskable).max(axis=1, initial=0)
    return (longest == maskable.sum(axis=1)) & (longest > wanted)
