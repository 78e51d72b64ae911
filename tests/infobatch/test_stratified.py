"""Stratified sampling: each function against a straightforward version in numpy."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.core.rng import fold_seed, generator
from pretrain.infobatch import stratified
from pretrain.infobatch.stratified import band_sizes, bands_of, draw_from_bands, round_sizes

chunks = st.sampled_from([7, 64, 1 << 20])  # samples processed at a time: many chunks, the last one short, or one


def scores(size: int, seed: int) -> Tensor:
    """float32 [size] over many orders of magnitude; some 0, -0, equal, or NaN."""
    rng = generator(seed)
    score = torch.rand(size, generator=rng) * 10 ** torch.randint(-12, 6, (size,), generator=rng).float()
    kind = torch.randint(12, (size,), generator=rng)
    score[kind == 0], score[kind == 1], score[kind == 2], score[kind == 3] = 0.0, -0.0, 0.75, torch.nan
    return score


@given(st.lists(st.integers(0, 0x7F7FFFFF), max_size=60, unique=True), st.integers(1, 400), st.integers(0, 999), chunks)
@settings(deadline=None)
def test_the_band_of_a_score_is_that_of_a_binary_search(bits: list[int], size: int, seed: int, chunk: int) -> None:
    """For edges that share a cell of the table, that equal scores, and that are 0 or denormal, too."""
    limits = torch.from_numpy(np.array(sorted(bits), dtype=np.uint32).view(np.float32))
    score = scores(size, seed)
    for number, edge in enumerate(limits[: size // 2]):  # on an edge and just below it
        score[2 * number] = edge
        score[2 * number + 1] = torch.nextafter(edge, torch.tensor(0.0))
    expected = np.searchsorted(limits.numpy(), score.numpy(), side="right")
    expected[score.isnan().numpy()] = len(limits) + 1
    with patch.object(stratified, "CHUNK", chunk):
        assert bands_of(score, limits).tolist() == expected.tolist()


def test_bands_of_edges_that_are_neighbouring_floats() -> None:
    edges = np.float32(1) + np.arange(200, dtype=np.float32) * np.float32(2**-23)  # all in one cell of the table
    score = np.float32(1) + np.arange(-50, 300, dtype=np.float32) * np.float32(2**-23)
    found = bands_of(torch.from_numpy(score), torch.from_numpy(edges))
    assert found.tolist() == np.searchsorted(edges, score, side="right").tolist()


@given(st.lists(st.integers(0, 8), min_size=1, max_size=300), chunks)
@settings(deadline=None)
def test_the_sizes_of_bands_are_counted(band: list[int], chunk: int) -> None:
    with patch.object(stratified, "CHUNK", chunk):
        found = band_sizes(np.array(band, dtype=np.uint8), 9)
    assert found.tolist() == [band.count(number) for number in range(9)]


def largest_remainders(expected: list[float], n: list[int], total: int) -> list[int]:
    """One sample at a time: to the band that lacks most of its share, or from the band that lacks least."""
    k = [min(max(int(e + 1e-9 * size), 1), size) for e, size in zip(expected, n, strict=True)]
    while sum(k) != total:
        sign = 1 if sum(k) < total else -1
        able = [b for b in range(len(k)) if (k[b] < n[b] if sign > 0 else k[b] > 1 and expected[b] < n[b])]
        if not able:
            break
        k[max(able, key=lambda b: (sign * (expected[b] - k[b]), -b))] += sign
    return k


@given(st.lists(st.tuples(st.integers(0, 60), st.floats(0.01, 1)), min_size=1, max_size=30))
@settings(deadline=None, max_examples=300)
def test_sizes_are_rounded_by_the_largest_remainders(bands: list[tuple[int, float]]) -> None:
    """Also for bands that are empty, kept whole, or due less than one sample."""
    n = torch.tensor([size for size, _ in bands], dtype=torch.float64)
    expected = n * torch.tensor([1.0 if share > 0.95 else share for _, share in bands], dtype=torch.float64)
    total = round(expected.sum().item())
    found = round_sizes(expected, n)
    assert found.tolist() == largest_remainders(expected.tolist(), [size for size, _ in bands], total)
    assert found.sum() >= total and ((found >= 1) | (n == 0)).all() and (found <= n).all()


def smallest_numbers(band: np.ndarray, k: np.ndarray, key: tuple[int, int]) -> list[int]:
    """All random numbers at once, and the k smallest of each band after a sort."""
    numbers = []
    for first in range(0, len(band), stratified.CHUNK):
        count = min(stratified.CHUNK, len(band) - first)
        raw = np.random.SFC64(fold_seed(*key, 2, first)).random_raw((count + 1) // 2)
        numbers.append(raw.view(np.uint32)[:count] % 2**stratified.BITS)
    number = np.concatenate(numbers)
    drawn: list[int] = []
    for each, size in enumerate(k.astype(int)):
        inside = np.flatnonzero(band == each)
        drawn += inside[number[inside].argsort(kind="stable")][:size].tolist()
    return sorted(drawn)


@pytest.mark.parametrize("chunk", [64, 1000, 1 << 20])
@given(st.integers(1, 3000), st.integers(1, 20), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_the_samples_drawn_have_the_smallest_random_numbers_of_their_band(
    chunk: int, size: int, bands: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    band = (bands * rng.random(size) ** 2).astype(np.uint8)  # of unlike sizes, some of them empty
    n = np.bincount(band, minlength=bands)
    k = np.minimum(np.maximum((n * rng.choice([0.0, 0.05, 0.5, 0.97, 1.0], bands)).astype(int), n > 0), n)
    with patch.object(stratified, "CHUNK", chunk):
        found = draw_from_bands(band, n.astype(float), k.astype(float), (seed, 3))
        assert sorted(found.tolist()) == smallest_numbers(band, k, (seed, 3))


def test_equal_random_numbers_go_by_index() -> None:
    """With 4 bits of random numbers nearly all of them are equal to others."""
    band = np.random.default_rng(0).integers(0, 3, 500).astype(np.uint8)
    n = np.bincount(band)
    k = n // 2
    with patch.object(stratified, "BITS", 4):
        found = draw_from_bands(band, n.astype(float), k.astype(float), (1, 2))
        assert sorted(found.tolist()) == smallest_numbers(band, k, (1, 2))
