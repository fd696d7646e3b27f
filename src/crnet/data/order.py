"""The order in which training reads rows: a pure function of seed and position.

The idea: a permutation that can be evaluated at any point without being stored. A position within
the epoch is split into two halves of k bits and goes through a Feistel network, in which each round
adds to one half a keyed hash of the other; whatever the hash, that is a bijection of the 4^k
numbers below 4^k, the smallest power of four that is at least num_rows. Numbers of num_rows or more
are sent through once more until they fall below it ("cycle walking"), which keeps the map a
bijection of the num_rows numbers and takes four passes at most on average.

Refused: a stored permutation, 8 bytes per row in every process and a dependence on numpy's
generators; a stride coprime to num_rows, which does not look shuffled.
"""

from __future__ import annotations

import numpy as np

_MASK = 2**64 - 1
_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def order(seed: int, num_rows: int, start: int, count: int) -> np.ndarray:
    """Return the row indices at positions ``start .. start + count`` of an endless sequence.

    Epoch e (position // num_rows) visits every row once, in an order that (seed, e) decides.

    Args:
        seed: any non-negative integer; every bit of it counts.
        num_rows: rows in an epoch, at least 1.
        start: first position, at least 0.
        count: positions wanted, at least 0.
    Returns:
        int64, shape (count,).
    Raises:
        ValueError: an argument is out of range.
    Cost: O(count) time and memory.
    """
    if num_rows < 1 or start < 0 or count < 0 or seed < 0:
        raise ValueError(
            f"order(seed={seed}, num_rows={num_rows}, start={start}, count={count}): num_rows must "
            "be at least 1, the rest at least 0"
        )
    position = np.arange(start, start + count, dtype=np.uint64)
    key = _mix(_key(seed) ^ (position // np.uint64(num_rows)))
    half_bits = np.uint64(((num_rows - 1).bit_length() + 1) // 2)
    value = position % np.uint64(num_rows)
    walking = np.arange(count)
    while walking.size:
        value[walking] = _feistel(value[walking], key[walking], half_bits)
        walking = walking[value[walking] >= np.uint64(num_rows)]
    return value.astype(np.int64)


def _key(seed: int) -> np.ndarray:
    """uint64, shape (1,); a word of 64 bits is mixed in after the other, the lowest first."""
    key = _mix(np.full(1, seed & _MASK, np.uint64))
    while seed := seed >> 64:
        key = _mix(key ^ np.uint64(seed & _MASK))
    return key


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64: every bit of the result depends on every bit of ``value`` (uint64, any shape)."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _feistel(value: np.ndarray, key: np.ndarray, half_bits: np.uint64) -> np.ndarray:
    half = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & half
    for _ in range(_ROUNDS):
        key = key + _GOLDEN
        left, right = right, left ^ (_mix(key ^ right) & half)
    return (left << half_bits) | right
