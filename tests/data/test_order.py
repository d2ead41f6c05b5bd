"""The row stream: permutations, epochs, windows of like lengths."""

from __future__ import annotations

import numpy as np
import pytest

from dwt_ds.data.rows import BLOCK_ROWS, WINDOW_ROWS, RowStream, key_of, mix64, permuted


def test_mix64_gives_splitmix64s_published_words() -> None:
    # First outputs of SplitMix64 seeded with 0 (the values published with the reference C code).
    gamma = 0x9E3779B97F4A7C15
    states = np.array([gamma, 2 * gamma % 2**64, 3 * gamma % 2**64], dtype=np.uint64)
    assert [hex(word) for word in mix64(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_key_of_depends_on_every_part_and_their_order() -> None:
    keys = {key_of(1, 2, 3), key_of(1, 3, 2), key_of(2, 2, 3), key_of(1, 2), key_of(1, 2, 3, 0)}
    assert len(keys) == 5


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 10_007])
def test_permuted_is_a_permutation(size: int) -> None:
    images = permuted(np.arange(size), size, key=7)
    assert sorted(images.tolist()) == list(range(size))


def test_permuted_is_uniform_enough() -> None:
    # Over 4,000 keys, where each of 8 indices goes: each of 64 cells expects 500, with a standard deviation of 21.
    counts = np.zeros((8, 8))
    for key in range(4000):
        counts[np.arange(8), permuted(np.arange(8), 8, key_of(key))] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500 * 7 / 8)


def test_permuted_leaves_no_pattern_of_its_halves() -> None:
    # Too few Feistel rounds keep the difference of indices that agree in half of their bits.
    indices = np.arange(4096)
    images = permuted(indices, 4096, key=5)
    for bit in (1, 64):
        differences = images ^ images[indices ^ bit]
        assert len(np.unique(differences >> 6)) > 55
        assert len(np.unique(differences & 63)) > 55


def test_each_epoch_visits_each_row_once_in_another_order() -> None:
    stream = RowStream(1000, seed=3)
    rows, epochs = stream.at(np.arange(3000))
    assert epochs.tolist() == [0] * 1000 + [1] * 1000 + [2] * 1000
    orders = rows.reshape(3, 1000)
    assert all(sorted(order.tolist()) == list(range(1000)) for order in orders)
    assert (orders[0] != orders[1]).mean() > 0.99
    assert (orders[0] != np.arange(1000)).mean() > 0.99
    assert (RowStream(1000, seed=4).at(np.arange(1000))[0] != orders[0]).mean() > 0.99


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_at_a_position_do_not_depend_on_what_else_is_asked(grouped: bool) -> None:
    size = WINDOW_ROWS + 1000
    lengths = np.random.default_rng(0).integers(4, 60, size, dtype=np.int32) if grouped else None
    whole = RowStream(size, seed=1, lengths=lengths).at(np.arange(2 * size))[0]
    again = RowStream(size, seed=1, lengths=lengths)
    for position in (2 * size - 1, 0, size, size - 1, WINDOW_ROWS, WINDOW_ROWS - 1):
        assert again.at(np.array([position]))[0][0] == whole[position]


def test_grouped_windows_cover_the_epoch_and_have_blocks_of_like_lengths() -> None:
    size = 2 * WINDOW_ROWS + 777
    lengths = np.random.default_rng(0).integers(4, 128, size, dtype=np.int32)
    rows = RowStream(size, seed=1, lengths=lengths).at(np.arange(size))[0]
    assert sorted(rows.tolist()) == list(range(size))
    spread = [np.ptp(lengths[rows[start : start + BLOCK_ROWS]]) for start in range(0, 2 * WINDOW_ROWS, BLOCK_ROWS)]
    assert max(spread) <= 6
    # Blocks do not come in order of length: no run of steps sees short rows only.
    means = [lengths[rows[start : start + BLOCK_ROWS]].mean() for start in range(0, WINDOW_ROWS, BLOCK_ROWS)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5
