"""The random numbers for the order of rows and for masks.

They are hashes of what a draw is for, instead of a generator with a state. Row order and masks must be the same on 1
rank or 8, after a resume, and with any other rows in the batch, so every draw is a pure function of its key. The hash
is the output function of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
2014, figure 15; constants: Stafford's "Mix13").
"""

from __future__ import annotations

import numpy as np

_FEISTEL_ROUNDS = 8
_WORD = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def mix64(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on an array of uint64, any shape but 0-d; returns a new array."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return words ^ (words >> np.uint64(31))


def key_of(*parts: int) -> int:
    """One 64-bit key out of any number of integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = (key + (part + 1) * _GOLDEN_GAMMA) & _WORD
        key = ((key ^ (key >> 30)) * _MULTIPLIER_1) & _WORD
        key = ((key ^ (key >> 27)) * _MULTIPLIER_2) & _WORD
        key ^= key >> 31
    return key


def hashes(key: int | np.ndarray, counters: np.ndarray) -> np.ndarray:
    """The `counters`-th words of the stream `key`: uint64, in the broadcast shape of the two.

    `key` is an int or a uint64 array; `counters` a non-negative integer array.
    """
    start = np.uint64(key) if isinstance(key, int) else key
    return mix64(start + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN_GAMMA))


def uniform(words: np.ndarray) -> np.ndarray:
    """uint64 words as float64 in [0, 1), from their top 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))


def below(words: np.ndarray, bound: int) -> np.ndarray:
    """uint64 words as int64 in [0, bound), bound < 2**32: the top 32 bits times bound (Lemire 2019, without rejection).

    The bias is below bound / 2**32.
    """
    return (((words >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def permuted(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """The images of `indices` (int64, each in [0, size)) under the permutation of [0, size) that `key` names.

    A Feistel network of 8 rounds over the smallest power of two that holds `size` (Luby and Rackoff 1988), walked
    until it lands below `size` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 4).
    O(1) memory; fewer than two walks on average.
    """
    if size == 1:
        return np.zeros_like(indices)
    bits = max(2, (size - 1).bit_length())
    images = _feistel(indices.astype(np.uint64), bits, key)
    outside = np.flatnonzero(images >= size)
    while len(outside):
        images[outside] = _feistel(images[outside], bits, key)
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def _feistel(words: np.ndarray, bits: int, key: int) -> np.ndarray:
    left_bits, right_bits = bits - bits // 2, bits // 2
    left = words >> np.uint64(right_bits)
    right = words & np.uint64((1 << right_bits) - 1)
    for round_index in range(_FEISTEL_ROUNDS):
        mixed = hashes(key_of(key, round_index), right) >> np.uint64(64 - left_bits)
        left, right = right, left ^ mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right
