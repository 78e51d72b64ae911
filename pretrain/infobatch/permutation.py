"""A random permutation evaluated where it is needed: an epoch's order without a table of N numbers."""

import math

import numpy as np

from pretrain.core.rng import fold_seed

ROUNDS = 6  # of the Feistel network, two half-rounds each


def permute(position: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Images of some positions under a random permutation of range(size).

    A Feistel network on the pairs (row, column) of a grid hardly larger than `size`; a result outside of range(size) is
    put in again until it lies inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        position: int64, each in [0, size).
        size: of the permutation, below 2^62.
        seed: of the permutation, 63 bits.

    Returns:
        int64, of the shape of `position`.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    image = position.copy()
    outside = np.arange(len(position))
    while len(outside):
        row, column = np.divmod(image[outside], columns)
        for turn in range(ROUNDS):
            row = _shift(row, column, rows, fold_seed(seed, 2 * turn))
            column = _shift(column, row, columns, fold_seed(seed, 2 * turn + 1))
        moved = row * columns + column
        image[outside] = moved
        outside = outside[moved >= size]
    return image


def _shift(value: np.ndarray, key: np.ndarray, size: int, seed: int) -> np.ndarray:
    """int64 in [0, size), size below 2^32: (value + a random function of (key, seed)) mod size."""
    bits = key.view(np.uint64) + np.uint64(seed)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    shifted = bits >> np.uint64(32)
    bits ^= shifted
    bits *= np.uint64(0x94D049BB133111EB)
    bits >>= np.uint64(32)
    bits *= np.uint64(size)  # 32 random bits times the size, over 2^32: faster than a remainder
    bits >>= np.uint64(32)
    bits += value.view(np.uint64)
    np.subtract(bits, np.uint64(size), out=shifted)  # wraps around to a huge number where bits is below size
    return np.minimum(bits, shifted, out=bits).view(np.int64)
