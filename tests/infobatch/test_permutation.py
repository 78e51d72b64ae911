"""The order of an epoch is a random permutation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.rng import fold_seed
from pretrain.infobatch.permutation import ROUNDS, permute


@given(st.integers(1, 3000), st.integers(0, 2**62))
@settings(deadline=None)
def test_the_order_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, seed).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_are_equally_likely(size: int) -> None:
    draws = 200 * math.factorial(size)
    count: dict[tuple[int, ...], int] = {}
    for draw in range(draws):
        order = tuple(permute(np.arange(size), size, 7919 * draw + 11).tolist())
        count[order] = count.get(order, 0) + 1
    assert len(count) == math.factorial(size)
    freedom = len(count) - 1
    assert sum((c - 200) ** 2 / 200 for c in count.values()) < freedom + 4.5 * (2 * freedom) ** 0.5


def test_positions_neighbours_and_epochs_are_not_correlated() -> None:
    size = 20_011
    first, second = (permute(np.arange(size), size, seed) for seed in (1, 2))
    for a, b in ((first, np.arange(size)), (first, second), (first[1:], first[:-1]), (first[7:], first[:-7])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / size**0.5


def feistel(position: int, size: int, seed: int) -> int:
    """The permutation in Python's integers, one position at a time."""
    rows = math.ceil(math.sqrt(size))
    columns = math.ceil(size / rows)

    def shifted(value: int, key: int, modulus: int, part: int) -> int:
        bits = (key + fold_seed(seed, part)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 32) * 0x94D049BB133111EB % 2**64
        return (value + (bits >> 32) * modulus // 2**32) % modulus

    while True:
        row, column = divmod(position, columns)
        for turn in range(ROUNDS):
            row = shifted(row, column, rows, 2 * turn)
            column = shifted(column, row, columns, 2 * turn + 1)
        position = row * columns + column
        if position < size:
            return position


@given(st.integers(1, 2**40), st.integers(0, 2**62), st.integers(0, 999))
@settings(deadline=None)
def test_a_permutation_is_a_feistel_network_with_cycle_walking(size: int, seed: int, draw: int) -> None:
    """For sizes whose tables would not fit into memory, too."""
    position = np.random.default_rng(draw).integers(0, size, 20)
    assert permute(position, size, seed).tolist() == [feistel(each, size, seed) for each in position.tolist()]
