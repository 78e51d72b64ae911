"""Stratified sampling without replacement: scores are cut into bands, and k of the n samples of each band are drawn.

Each function goes over N samples in one pass and allocates little beside its result, so that it takes a second for
100 million samples. tests/infobatch/test_stratified.py compares each with a straightforward version.
"""

# torch does not declare all types of tolist, split and from_numpy.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import numpy as np
import torch
from torch import Tensor

from pretrain.core.rng import fold_seed

CHUNK = 1 << 20  # samples processed at a time
BITS = 30  # of the random number by which a sample is drawn or not; a difference of two fits into 32


def bands_of(score: Tensor, edges: Tensor) -> np.ndarray:
    """The band of each score: b where edges[b - 1] <= score < edges[b].

    A table over the upper 16 bits of a float32 gives the band up to the edges that share a cell; only those are
    compared.

    Args:
        score: float32 [N] on the CPU, not negative, or NaN.
        edges: float32 [E], ascending, finite, E below 254.

    Returns:
        uint8 [N]; E + 1 for NaN.
    """
    limits = np.append(edges.numpy(), np.full(2, np.inf, dtype=np.float32))  # no score reaches the last two
    start = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).copy()
    start[1 << 15 :] = 0  # of negative numbers only -0 occurs
    table = np.searchsorted(limits[:-2], start, side="right").astype(np.uint8)
    table[(np.arange(1 << 16) & 0x7FFF) >= 0x7F80] = len(edges) + 1
    edges_per_cell = np.bincount(limits[:-2].view(np.uint32) >> 16, minlength=1).max()
    band = np.empty(len(score), dtype=np.uint8)
    for first in range(0, len(score), CHUNK):
        chunk = score[first : first + CHUNK].numpy()
        part = band[first : first + CHUNK]
        table.take(chunk.view(np.uint32) >> 16, out=part, mode="wrap")
        for _ in range(edges_per_cell if len(edges) else 0):
            part += chunk >= limits.take(part)
    return band


def band_sizes(band: np.ndarray, bands: int) -> Tensor:
    """float64 [bands]; how many samples are in each band, of `band`, uint8 [N]."""
    chunks = (band[first : first + CHUNK] for first in range(0, len(band), CHUNK))
    return torch.from_numpy(sum(np.bincount(chunk, minlength=bands) for chunk in chunks)).double()


def round_sizes(expected: Tensor, n: Tensor) -> Tensor:
    """Whole numbers that sum to the rounded sum of `expected`, by the largest remainders.

    Args:
        expected: float64 [bands]; how many samples of each band are to be drawn, with fractions.
        n: float64 [bands]; how many there are.

    Returns:
        float64 [bands], k: at most n, and at least 1 where n is not 0, even if that makes their sum larger.
    """
    total = round(expected.sum().item())
    k = torch.where(n > 0, (expected + 1e-9 * n).floor().clamp(min=1), 0).minimum(n)
    while (missing := total - int(k.sum())) != 0:
        adjustable = (k < n) if missing > 0 else (k > 1) & (expected < n)  # a band of probability 1 stays whole
        error = torch.where(adjustable, (expected - k) * (1 if missing > 0 else -1), -torch.inf)
        order = error.sort(descending=True, stable=True).indices[: abs(missing)]
        order = order[error[order] > -torch.inf]
        if not len(order):
            break
        k[order] += 1 if missing > 0 else -1
    return k


def draw_from_bands(band: np.ndarray, n: np.ndarray, k: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Draw k of the n samples of every band, uniformly and without replacement.

    Every sample has a random number, and the k smallest of a band are drawn. One pass takes those whose number is below
    k/n by more than 8 standard deviations, and collects those near k/n; only these few are sorted.

    Args:
        band: uint8 [N].
        n: float64 [bands]; the size of each band.
        k: float64 [bands]; how many to draw of each.
        key: (seed, epoch) of the random numbers.

    Returns:
        int32 [sum of k] (int64 beyond 2^31 samples), in no particular order.
    """
    share = k / np.maximum(n, 1)
    spread = 8 * np.sqrt(share * (1 - share) / np.maximum(n, 1)) + 40 / np.maximum(n, 1)
    largest = (1 << BITS) - 1
    whole = k == n
    low = np.where(whole, largest, np.clip((share - spread) * largest, -1, largest)).astype(np.int32)
    high = np.where(whole, largest, np.clip((share + spread) * largest, -1, largest)).astype(np.int32)
    widest = (high - low).max()
    drawn = np.empty(int(k.sum()), dtype=np.int32 if len(band) < 1 << 31 else np.int64)
    filled, taken = 0, np.zeros(len(n), dtype=np.int64)
    near: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for first in range(0, len(band), CHUNK):
        part = band[first : first + CHUNK]
        stream = np.random.SFC64(fold_seed(*key, 2, first))
        number = stream.random_raw((len(part) + 1) // 2).view(np.int32)[: len(part)]
        number &= largest
        above = number - low.take(part)
        certain = above <= 0
        found = np.flatnonzero(certain)
        taken += np.bincount(part[found], minlength=len(n))
        found += first
        drawn[filled : filled + len(found)] = found
        filled += len(found)
        close = np.flatnonzero((above <= widest) & ~certain)
        close = close[number[close] <= high[part[close]]]
        near.append((close + first, part[close], number[close]))
    index, of_band, number = map(np.concatenate, zip(*near, strict=True))
    order = number.argsort(kind="stable")
    order = order[of_band[order].argsort(kind="stable")]  # by band, then by number, then by index
    rank = np.arange(len(order)) - np.searchsorted(of_band[order], of_band[order])  # within the band
    rest = order[rank < (k - taken)[of_band[order]]]
    assert filled + len(rest) == len(drawn), "the limit of a band lies outside 8 standard deviations"
    drawn[filled:] = index[rest]
    return drawn
