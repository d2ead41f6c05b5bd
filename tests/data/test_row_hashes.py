"""Hashes for draws, and permutations made of them."""

from __future__ import annotations

import numpy as np
import pytest

from dwt_ds.data.row_hashes import key_of, mix64, permuted


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
