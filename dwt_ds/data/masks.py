"""Masked-language-model masks, drawn on the fly as a pure function of (seed, epoch, row)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dwt_ds.data.hashing import below, hashes, key_of, uniform
from dwt_ds.data.tokenizer import TokenizerFacts

_MASK_STREAM = 3
_CHOICE, _ACTION, _REPLACEMENT = 0, 1, 2
_NEVER = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Masking:
    """How labels are chosen and what the model sees in their place (BERT, Devlin et al. 2019, appendix A.1)."""

    probability: float = 0.15
    """Share of a row's tokens that are predicted."""
    mask_share: float = 0.8
    """Share of the predicted tokens that are shown as the mask token."""
    random_share: float = 0.1
    """Share of the predicted tokens that are shown as a random ordinary token; the rest are shown as they are."""
    draw: str = "fixed"
    """"fixed": every row of n tokens gets round(probability * (n - 2)) labels; "bernoulli": each token by itself."""
    whole_word: bool = False
    """Choose whole words. With "fixed" a word that would pass the row's number is passed over for the next."""

    def __post_init__(self) -> None:
        if not 0.0 < self.probability <= 1.0:
            raise ValueError(f"masking.probability is {self.probability}: it must lie in (0, 1]")
        if self.mask_share < 0.0 or self.random_share < 0.0 or self.mask_share + self.random_share > 1.0 + 1e-9:
            raise ValueError(
                f"masking.mask_share {self.mask_share} and random_share {self.random_share}: "
                "neither may be negative and their sum must not pass 1"
            )
        if self.draw not in ("fixed", "bernoulli"):
            raise ValueError(f'masking.draw is "{self.draw}": it must be "fixed" or "bernoulli"')


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
    masking: Masking,
    seed: int,
) -> MaskedRows:
    """Mask a batch. Special tokens, padding and the unknown token are never labelled.

    input_ids: (B, S) int64; lengths: (B,) real tokens a row; rows, epochs: (B,) int64, which with `seed` decide every
    draw, so that a row is masked alike in whatever batch it comes.
    """
    row_keys = hashes(hashes(key_of(_MASK_STREAM, seed), epochs), rows)[:, None]
    columns = np.arange(input_ids.shape[1], dtype=np.uint64)[None, :]
    maskable = ~facts.is_special[input_ids] & (columns < lengths[:, None].astype(np.uint64))

    choice = hashes(hashes(row_keys, np.full(1, _CHOICE)), columns)
    word_of_token = _words(input_ids, maskable, facts) if masking.whole_word else None
    if word_of_token is not None:
        choice = np.take_along_axis(choice, word_of_token, axis=1)
    if masking.draw == "bernoulli":
        chosen = maskable & (uniform(choice) < masking.probability)
    else:
        wanted = np.minimum(labels_by_length(lengths, masking.probability), maskable.sum(axis=1))
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
    shown = np.where(action < masking.mask_share + masking.random_share, replacement, labels)
    shown = np.where(action < masking.mask_share, facts.mask_id, shown)
    masked = input_ids.copy()
    masked.reshape(-1)[positions] = shown
    return MaskedRows(masked, positions, labels)


def labels_by_length(lengths: np.ndarray, probability: float) -> np.ndarray:
    """Labelled tokens, at least 1, of rows with `lengths` (B,) real tokens, if so many may be labelled: (B,) int64.

    Counted without the outer two special tokens, so that a full row has the same number wherever documents meet in it.
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
    """(B, S) bool: whole words in the order of their draw, each taken if it does not pass `wanted` (B,) tokens."""
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
