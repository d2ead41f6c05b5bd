"""Masks: rates, what is never masked, and that they are a function of (seed, epoch, row) alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.masks import MaskedRows, draw_further, draw_masks
from dwt_ds.data.tokenizer import TokenizerFacts

VOCAB = 1000
PAD, UNK, CLS, SEP, MASK = range(5)


@pytest.fixture(scope="module")
def facts() -> TokenizerFacts:
    """Ids 0-4 are special; of the others, those from 700 on carry on a word."""
    is_special = np.arange(VOCAB) < 5
    return TokenizerFacts(VOCAB, PAD, CLS, SEP, MASK, is_special, np.arange(VOCAB) >= 700, np.arange(5, VOCAB))


def full_rows(count: int, width: int = 128, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(5, VOCAB, (count, width))
    ids[:, 0], ids[:, -1] = CLS, SEP
    return ids, np.full(count, width)


def draw(
    ids: np.ndarray, lengths: np.ndarray, facts: TokenizerFacts, *, epoch: int = 0, seed: int = 1, **masking: Any
) -> MaskedRows:
    rows = np.arange(len(ids))
    return draw_masks(ids, lengths, rows, np.full(len(ids), epoch), facts, DataConfig(**masking), seed)


def assert_share(hits: float, trials: int, share: float) -> None:
    """Within five standard deviations of a binomial share."""
    assert abs(hits / trials - share) < 5 * np.sqrt(share * (1 - share) / trials)


def test_fixed_draw_gives_each_full_row_the_same_number(facts: TokenizerFacts) -> None:
    ids, lengths = full_rows(500)
    ids[::7, 40] = SEP  # where documents meet
    masked = draw(ids, lengths, facts)
    counts = np.bincount(masked.positions // 128, minlength=500)
    assert set(counts.tolist()) == {19}  # round(0.15 * 126)


@pytest.mark.parametrize(("length", "labels"), [(2, 0), (3, 1), (4, 1), (12, 2), (62, 9), (128, 19)])
def test_fixed_draw_rounds_and_takes_at_least_one(facts: TokenizerFacts, length: int, labels: int) -> None:
    ids = np.full((1, 128), PAD)
    ids[0, :length] = 50
    ids[0, 0], ids[0, length - 1] = CLS, SEP
    assert len(draw(ids, np.array([length]), facts).labels) == labels


def test_bernoulli_draw_has_the_rate_and_a_spread(facts: TokenizerFacts) -> None:
    ids, lengths = full_rows(2000)
    counts = np.bincount(draw(ids, lengths, facts, label_draw="bernoulli").positions // 128, minlength=2000)
    assert_share(counts.sum(), 2000 * 126, 0.15)
    assert abs(counts.std() - np.sqrt(126 * 0.15 * 0.85)) < 0.3


@pytest.mark.parametrize("masking", [{}, {"label_draw": "bernoulli"}, {"whole_word": True}, {"mask_probability": 0.4}])
def test_shares_of_mask_random_and_kept(facts: TokenizerFacts, masking: dict[str, Any]) -> None:
    ids, lengths = full_rows(2000)
    masked = draw(ids, lengths, facts, **masking)
    shown = masked.input_ids.reshape(-1)[masked.positions]
    total = len(shown)
    is_mask, is_kept = shown == MASK, shown == masked.labels
    assert_share(is_mask.sum(), total, 0.8)
    # A random token is the true one in 1 of 995 cases.
    assert_share(is_kept.sum(), total, 0.1 + 0.1 / 995)
    random = shown[~is_mask & ~is_kept]
    assert_share(len(random), total, 0.1 * 994 / 995)
    assert not facts.is_special[random].any()
    assert len(np.unique(random)) > 0.9 * min(995, len(random) / 4)


@pytest.mark.parametrize("masking", [{}, {"label_draw": "bernoulli"}, {"whole_word": True}])
def test_every_place_is_chosen_equally_often(facts: TokenizerFacts, masking: dict[str, Any]) -> None:
    ids, lengths = full_rows(4000)
    masked = draw(ids, lengths, facts, **masking)
    by_column = np.bincount(masked.positions % 128, minlength=128)[1:-1]
    expected = by_column.mean()
    assert np.abs(by_column - expected).max() < 5.5 * np.sqrt(expected)


def test_special_tokens_and_padding_are_never_labelled_nor_changed(facts: TokenizerFacts) -> None:
    draw_ids = np.random.default_rng(1).integers(0, 12, (500, 64))  # full of special tokens
    lengths = np.random.default_rng(2).integers(2, 65, 500)
    draw_ids[np.arange(64)[None, :] >= lengths[:, None]] = PAD
    for masking in (
        {"mask_probability": 0.9},
        {"label_draw": "bernoulli", "mask_probability": 0.9},
        {"whole_word": True},
    ):
        masked = draw(draw_ids, lengths, facts, **masking)
        assert masked.labels.min() >= 5
        special = facts.is_special[draw_ids]
        assert (masked.input_ids[special] == draw_ids[special]).all()
        assert (masked.positions % 64 < lengths[masked.positions // 64]).all()


def test_labels_are_the_true_tokens_and_the_rest_is_untouched(facts: TokenizerFacts) -> None:
    ids, lengths = full_rows(100)
    masked = draw(ids, lengths, facts)
    assert (np.diff(masked.positions) > 0).all()
    assert (masked.labels == ids.reshape(-1)[masked.positions]).all()
    untouched = np.ones(ids.size, dtype=bool)
    untouched[masked.positions] = False
    assert (masked.input_ids.reshape(-1)[untouched] == ids.reshape(-1)[untouched]).all()


@pytest.mark.parametrize("kind", ["fixed", "bernoulli"])
def test_whole_words_are_labelled_whole(facts: TokenizerFacts, kind: str) -> None:
    ids, lengths = full_rows(1000)
    ids[::5, 30] = SEP  # a word never reaches over a special token
    masked = draw(ids, lengths, facts, whole_word=True, label_draw=kind)
    labelled = np.zeros(ids.size, dtype=bool)
    labelled[masked.positions] = True
    labelled = labelled.reshape(ids.shape)
    word = np.zeros_like(ids)
    for column in range(1, 128):
        continues = (ids[:, column] >= 700) & (ids[:, column - 1] >= 5)
        word[:, column] = np.where(continues, word[:, column - 1], column)
    pieces_per_word: dict[tuple[int, int], set[bool]] = {}
    for row, column in np.ndindex(*ids.shape):
        if ids[row, column] >= 5:
            pieces_per_word.setdefault((row, word[row, column]), set()).add(bool(labelled[row, column]))
    assert all(len(states) == 1 for states in pieces_per_word.values())
    counts = labelled.sum(axis=1)
    if kind == "fixed":
        assert counts.max() == 19
        assert (counts == 19).mean() > 0.95
    else:
        # Words of w tokens inflate the binomial variance by sum(w^2) / sum(w), here below 2.5.
        assert abs(counts.sum() / 126_000 - 0.15) < 5 * np.sqrt(2.5 * 0.15 * 0.85 / 126_000)


def test_a_row_is_masked_alike_in_any_batch(facts: TokenizerFacts) -> None:
    ids, lengths = full_rows(32, width=40)
    wide = np.concatenate([ids, np.full((32, 24), PAD)], axis=1)
    for masking in (DataConfig(), DataConfig(label_draw="bernoulli"), DataConfig(whole_word=True)):
        rows, epochs = np.arange(32) + 900, np.arange(32) % 3
        together = draw_masks(ids, lengths, rows, epochs, facts, masking, 5)
        for row in (0, 7, 31):
            alone = draw_masks(
                wide[row : row + 1], lengths[:1], rows[row : row + 1], epochs[row : row + 1], facts, masking, 5
            )
            assert (alone.input_ids[0, :40] == together.input_ids[row]).all()


def test_masks_change_with_epoch_row_and_seed(facts: TokenizerFacts) -> None:
    ids, lengths = full_rows(64)
    ids[:] = ids[0]
    first = draw(ids, lengths, facts)
    assert len(np.unique(first.input_ids, axis=0)) == 64
    for other in (draw(ids, lengths, facts, epoch=1), draw(ids, lengths, facts, seed=2)):
        # Two independent draws of 19 of 126 share 15% of their places.
        assert_share(np.isin(other.positions, first.positions).sum(), len(first.positions), 19 / 126)


def test_further_tokens_are_drawn_evenly_and_change_with_epoch_row_and_seed(facts: TokenizerFacts) -> None:
    ids, lengths = full_rows(1000)
    masked, rows, epochs = draw(ids, lengths, facts), np.arange(1000), np.zeros(1000, dtype=np.int64)

    def drawn(epoch: int = 0, seed: int = 1, share: float = 0.3) -> np.ndarray:
        return draw_further(masked, lengths, rows, epochs + epoch, 0.15, share, seed)

    first = drawn()
    assert (np.bincount(first // 128) == 33).all()  # round(0.3 * (128 - 19))
    by_column = np.bincount(first % 128, minlength=128)
    # The outer two columns have no label; of the other 126, 107 are free.
    inner, outer = (107 / 126) * (33 / 109), 33 / 109
    spread = 5 * np.sqrt(1000 * 0.25)
    assert np.abs(by_column[1:-1] - 1000 * inner).max() < spread
    assert np.abs(by_column[[0, -1]] - 1000 * outer).max() < spread
    # Epochs, seeds and rows have draws of their own, that meet by chance.
    for other, share in ((drawn(epoch=1), outer), (drawn(seed=2), outer), (first[33:] - 128, inner)):
        assert_share(np.isin(other, first).sum(), len(other), share)
    assert np.isin(first, drawn(share=0.5)).all(), "a larger share adds to a smaller one"
