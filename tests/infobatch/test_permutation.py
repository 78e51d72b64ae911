"""The order of an epoch is a random permutation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.infobatch.plan import permuted


@given(st.integers(1, 3000), st.integers(0, 2**62))
@settings(deadline=None)
def test_the_order_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permuted(np.arange(size), size, seed).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_order_is_as_likely(size: int) -> None:
    draws = 200 * math.factorial(size)
    count: dict[tuple[int, ...], int] = {}
    for draw in range(draws):
        order = tuple(permuted(np.arange(size), size, 7919 * draw + 11).tolist())
        count[order] = count.get(order, 0) + 1
    assert len(count) == math.factorial(size)
    freedom = len(count) - 1
    assert sum((c - 200) ** 2 / 200 for c in count.values()) < freedom + 4.5 * (2 * freedom) ** 0.5


def test_places_neighbours_and_epochs_are_not_correlated() -> None:
    size = 20_011
    first, second = (permuted(np.arange(size), size, seed) for seed in (1, 2))
    for a, b in ((first, np.arange(size)), (first, second), (first[1:], first[:-1]), (first[7:], first[:-7])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / size**0.5
