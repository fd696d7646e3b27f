"""The order of rows: a permutation per epoch, the same for ever. Every equality is exact."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crnet.data.order import order

GOLDEN_SMALL = [5, 6, 0, 4, 2, 7, 8, 3, 1, 9, 8, 7, 2, 4, 9, 6, 1, 5, 0, 3]
GOLDEN_LARGE = [329473452255, 637273614845, 343834040963, 156058098078]


@given(seed=st.integers(0, 2**70), num_rows=st.integers(1, 3000), epoch=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_every_epoch_is_a_permutation(seed: int, num_rows: int, epoch: int) -> None:
    found = order(seed, num_rows, epoch * num_rows, num_rows)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(num_rows))


@given(
    st.integers(0, 2**64), st.integers(1, 300), st.integers(0, 2000), st.lists(st.integers(0, 99))
)
@settings(max_examples=100, deadline=None)
def test_order_is_the_same_however_it_is_cut(
    seed: int, num_rows: int, start: int, cuts: list[int]
) -> None:
    whole = order(seed, num_rows, start, sum(cuts))
    pieces = [order(seed, num_rows, start + sum(cuts[:i]), n) for i, n in enumerate(cuts)]
    assert np.array_equal(np.concatenate([*pieces, np.empty(0, np.int64)]), whole)


def test_order_is_fixed_for_ever() -> None:
    """A checkpoint's position means the same rows in every version: these numbers never change."""
    assert order(0, 10, 0, 20).tolist() == GOLDEN_SMALL
    assert order(2**64 - 1, 10**12, 10**13, 4).tolist() == GOLDEN_LARGE


@pytest.mark.parametrize("num_rows", [100, 1000, 4097])
def test_order_looks_shuffled(num_rows: int) -> None:
    """Within 5 standard deviations of what independent uniform permutations would show."""
    epochs = 40
    found = order(7, num_rows, 0, epochs * num_rows).reshape(epochs, num_rows)
    place = np.arange(num_rows)
    for one in found:
        assert abs(np.corrcoef(place, one)[0, 1]) < 5 / num_rows**0.5
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 5 / num_rows**0.5
    # Chances that a row keeps its place, or that two epochs or neighbouring seeds agree: 1 / n.
    other = order(8, num_rows, 0, epochs * num_rows).reshape(epochs, num_rows)
    for left, right in ((found, place), (found[1:], found[:-1]), (found, other)):
        assert abs((left == right).sum() - len(left)) < 5 * len(left) ** 0.5


@pytest.mark.parametrize("num_rows", [2, 3, 4])
def test_small_orders_are_equally_frequent(num_rows: int) -> None:
    epochs = 24_000
    found = order(1, num_rows, 0, epochs * num_rows).reshape(epochs, num_rows)
    counts = Counter(map(tuple, found.tolist()))
    possible = {2: 2, 3: 6, 4: 24}[num_rows]
    assert len(counts) == possible
    expected = epochs / possible
    assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5


def test_order_refuses_nonsense() -> None:
    for arguments in ((0, 0, 0, 1), (0, 1, -1, 1), (0, 1, 0, -1), (-1, 1, 0, 1)):
        with pytest.raises(ValueError, match="must be at least"):
            order(*arguments)
