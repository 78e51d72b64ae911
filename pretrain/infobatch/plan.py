"""A plan: one epoch as a rule and a seed make it.

Whatever can be computed where it is asked for is not stored: the order is a permutation that is evaluated
at a position, a level a function of the sample's number and the epoch, a weight a function of its score.
What is stored is who is kept, four bytes each, and nothing where everybody is.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.core.rng import fold_seed
from pretrain.infobatch.policies import SamplingRule

CHUNK = 1 << 20  # samples planned at a time
BLOCK = 1 << 14  # visits whose place in the order is computed at a time
BITS = 30  # of the random number by which a sample is kept or not; differences of them fit into 32
ROUNDS = 6  # of the permutation; each is two steps
STEP = 0x6A09E667F3BCC909  # 2^64 (sqrt(2) - 1): levels of neighbouring samples
TURN = 0x9E3779B97F4A7C15  # 2^64 (golden ratio - 1): levels of one sample's visits


class Tables(NamedTuple):
    """What a visit's weight depends on beside its score, on the device where it is asked for."""

    edges: Tensor  # float32 [E + 1]; the last one infinite: a sample never visited lies beyond it
    weight: Tensor  # float32 [E + 2]; of each band and, the last one, of those never visited
    density: Tensor  # float32 [bins], 1 on average
    cumulative: Tensor  # float32 [bins]; share of the visits below each bin's end


class Plan:
    """Whom to visit in an epoch, in which order, at what level, and what each visit counts for.

    Args:
        rule: what is kept of whom.
        score: float32 [N] on the CPU, NaN where never visited; it must not change while the plan is in use.
        at_random: choose as many as the rule does, but whatever their scores.
        clock: what the plan's randomness is of, (seed, epoch).

    Attributes:
        length: K, the visits.
    """

    def __init__(self, rule: SamplingRule, score: Tensor, clock: tuple[int, int], *, at_random: bool = False) -> None:
        self.size, self.clock = len(score), clock
        edges = rule.edges
        band = _bands(score, edges)
        n = _count(band, len(edges) + 2)
        keep = torch.cat([rule.keep, torch.tensor([rule.unseen], dtype=torch.float64)])
        if at_random:
            edges, keep = edges[:0], torch.stack([(keep * n)[:-1].sum() / n[:-1].sum().clamp(min=1), keep[-1]])
            band = (band == len(n) - 1).view(np.uint8)
            n = torch.stack([n[:-1].sum(), n[-1]])
        k = _whole(keep * n, n)
        self.length = int(k.sum())
        self.kept = None if self.length == self.size else _choose(band, n.numpy(), k.numpy(), clock)
        density = rule.density if rule.density is not None else torch.ones(1, dtype=torch.float64)
        density = density / density.mean()
        weight = n / k.clamp(min=1)
        cumulative = density.cumsum(0) / len(density)
        self._tables = {edges.device: Tables(_beyond(edges), weight.float(), density.float(), cumulative.float())}
        self._score = score

    def _on(self, device: torch.device) -> Tables:
        """The tables on a device; copied there once."""
        if device not in self._tables:
            self._tables[device] = Tables(*(table.to(device) for table in self._tables[torch.device("cpu")]))
        return self._tables[device]

    # -- by position: the order ----------------------------------------------------------------------

    def at(self, position: np.ndarray) -> np.ndarray:
        """int64; the samples visited at these positions of the epoch, int64 in [0, K)."""
        place = permuted(position, self.length, fold_seed(*self.clock, 0))
        return place if self.kept is None else self.kept[place].astype(np.int64)

    def visits(self, start: int, step: int = 1) -> Iterator[int]:
        """The samples at positions start, start + step, ..."""
        for first in range(start, self.length, BLOCK * step):
            yield from self.at(np.arange(first, min(first + BLOCK * step, self.length), step)).tolist()

    # -- by sample -----------------------------------------------------------------------------------

    def _uniform(self, index: Tensor) -> Tensor:
        """float32 in [0, 1): before the density of levels is applied.

        A Kronecker sequence in two dimensions: of the samples in any stretch of numbers as many as of any other lie in
        every part of the axis, and so do the visits of one sample. The seed moves them all.
        """
        seed, epoch = self.clock
        start = fold_seed(seed, 1) * 2 + epoch * TURN
        bits = index * _signed(STEP) + _signed(start)  # products of int64 wrap around: that is the fraction
        return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24

    def level_of(self, index: Tensor) -> Tensor:
        """float32 in [0, 1): where samples, int64, are visited."""
        uniform = self._uniform(index)
        _, _, density, cumulative = self._on(index.device)
        if len(density) == 1:
            return uniform
        bin = torch.bucketize(uniform, cumulative[:-1], right=True)
        within = (uniform - cumulative[bin]) * len(density) / density[bin] + 1  # counted from the bin's end
        return ((bin + within.clamp(0, 1)) / len(density)).clamp(max=1 - 2**-24)

    def weight_of(self, index: Tensor, score: Tensor) -> Tensor:
        """float32; what visits of samples of these scores count for: 1 / (chance of being kept * density of level)."""
        edges, weight, density, cumulative = self._on(index.device)
        band = torch.bucketize(score.nan_to_num(nan=torch.inf), edges, right=True)
        if len(density) == 1:
            return weight[band]
        return weight[band] / density[torch.bucketize(self._uniform(index), cumulative[:-1], right=True)]

    def stranger(self, visited: Tensor) -> int | None:
        """A sample among the `visited`, bool [N], that the plan does not visit, if there is one."""
        if self.kept is None:
            return None
        visited = visited.clone()
        visited[torch.from_numpy(self.kept)] = False
        return int(visited.int().argmax()) if visited.any() else None

    # -- the whole, to look at -----------------------------------------------------------------------

    @property
    def order(self) -> Tensor:
        """int64 [K]; whom to visit, in this order."""
        return torch.from_numpy(self.at(np.arange(self.length)))

    @property
    def weight(self) -> Tensor:
        """float32 [N]; what a visit counts for, 0 where pruned."""
        visited = torch.arange(self.size) if self.kept is None else torch.from_numpy(self.kept).long()
        return torch.zeros(self.size).scatter_(0, visited, self.weight_of(visited, self._score[visited]))

    @property
    def level(self) -> Tensor:
        """float32 [N] in [0, 1); where each is visited."""
        return self.level_of(torch.arange(self.size))

    def fingerprint(self) -> int:
        """A number that a plan of another rule, seed or scores would not have."""
        some = self.at(np.linspace(0, self.length - 1, 64).astype(np.int64))
        kept = 0 if self.kept is None else int(self.kept.sum(dtype=np.int64))
        weights = torch.cat(self._on(torch.device("cpu"))).view(torch.int32)
        return fold_seed(self.length, kept, *some.tolist(), *(int(value) & 0xFFFFFFFF for value in weights))


def _beyond(edges: Tensor) -> Tensor:
    return torch.cat([edges, torch.tensor([torch.inf])])


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _bands(score: Tensor, edges: Tensor) -> np.ndarray:
    """uint8 [N]; the band of each score: of E edges, E + 1 bands and one more for NaN.

    Quick because it hardly compares: the upper 16 bits of a float32 tell its band up to the edges in the same cell.
    """
    limits = np.append(edges.numpy(), np.full(2, np.inf, dtype=np.float32))  # no score reaches the last two
    start = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).copy()
    start[1 << 15 :] = 0  # of negative numbers only -0 occurs
    table = np.searchsorted(limits[:-2], start, side="right").astype(np.uint8)
    table[(np.arange(1 << 16) & 0x7FFF) >= 0x7F80] = len(edges) + 1
    inside = np.bincount(limits[:-2].view(np.uint32) >> 16, minlength=1).max()  # edges in one cell, at most
    band = np.empty(len(score), dtype=np.uint8)
    for first in range(0, len(score), CHUNK):
        chunk = score[first : first + CHUNK].numpy()
        part = band[first : first + CHUNK]
        table.take(chunk.view(np.uint32) >> 16, out=part, mode="wrap")
        for _ in range(inside if len(edges) else 0):
            part += chunk >= limits.take(part)
    return band


def _whole(wanted: Tensor, n: Tensor) -> Tensor:
    """float64; whole numbers that sum to the sum, rounded, of `wanted`; at least 1 and at most n where n is not 0.

    By the largest remainders. Only where fewer are wanted than there are bands do they sum to more.
    """
    total = round(wanted.sum().item())
    k = torch.where(n > 0, (wanted + 1e-9 * n).floor().clamp(min=1), 0).minimum(n)
    while (missing := total - int(k.sum())) != 0:
        can = (k < n) if missing > 0 else (k > 1) & (wanted < n)  # who is to be kept for certain is
        error = torch.where(can, (wanted - k) * (1 if missing > 0 else -1), -torch.inf)
        order = error.sort(descending=True, stable=True).indices[: abs(missing)]
        order = order[error[order] > -torch.inf]
        if not len(order):
            break
        k[order] += 1 if missing > 0 else -1
    return k


def _count(band: np.ndarray, bands: int) -> Tensor:
    """float64 [bands]; how many samples are in each."""
    chunks = (band[first : first + CHUNK] for first in range(0, len(band), CHUNK))
    return torch.from_numpy(sum(np.bincount(chunk, minlength=bands) for chunk in chunks)).double()


def _choose(band: np.ndarray, n: np.ndarray, k: np.ndarray, clock: tuple[int, int]) -> np.ndarray:
    """int32 [K] (int64 beyond 2^31 samples); k of the n samples of every band, drawn without replacement.

    Kept are those with the k smallest of n random numbers. One pass takes in all whose number is certainly small
    enough, and puts aside those near the limit; these few are sorted.
    """
    some = np.maximum(n, 1)
    share = k / some
    spread = 8 * np.sqrt(share * (1 - share) / some) + 40 / some
    most = (1 << BITS) - 1
    always = k == n
    low = np.where(always, most, np.clip((share - spread) * most, -1, most)).astype(np.int32)
    high = np.where(always, most, np.clip((share + spread) * most, -1, most)).astype(np.int32)
    widest = (high - low).max()
    kept = np.empty(int(k.sum()), dtype=np.int32 if len(band) < 1 << 31 else np.int64)
    filled, near, taken = 0, [], np.zeros(len(n), dtype=np.int64)
    for first in range(0, len(band), CHUNK):
        part = band[first : first + CHUNK]
        stream = np.random.SFC64(fold_seed(*clock, 2, first))
        draw = stream.random_raw((len(part) + 1) // 2).view(np.int32)[: len(part)]
        draw &= most
        above = draw - low.take(part)
        sure = above <= 0
        found = np.flatnonzero(sure)
        taken += np.bincount(part[found], minlength=len(n))
        found += first
        kept[filled : filled + len(found)] = found
        filled += len(found)
        aside = np.flatnonzero((above <= widest) & ~sure)
        aside = aside[draw[aside] <= high[part[aside]]]
        near.append((aside + first, part[aside], draw[aside]))
    index, of, draw = map(np.concatenate, zip(*near, strict=True))
    order = draw.argsort(kind="stable")
    order = order[of[order].argsort(kind="stable")]  # by band, within it by draw, then by index
    rank = np.arange(len(order)) - np.searchsorted(of[order], of[order])  # within the band
    chosen = order[rank < (k - taken)[of[order]]]
    assert filled + len(chosen) == len(kept), "a band's limit lies outside 8 standard deviations"
    kept[filled:] = index[chosen]
    return kept


def permuted(position: np.ndarray, size: int, seed: int) -> np.ndarray:
    """int64; where a random permutation of `size` things takes these positions, int64.

    A Feistel network on pairs (a, b) of a grid hardly larger than `size`; whoever lands outside goes on until inside
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    place = position.copy()
    outside = np.arange(len(position))
    while len(outside):
        a, b = np.divmod(place[outside], columns)
        for turn in range(ROUNDS):
            a = _turned(a, b, rows, fold_seed(seed, 2 * turn))
            b = _turned(b, a, columns, fold_seed(seed, 2 * turn + 1))
        moved = a * columns + b
        place[outside] = moved
        outside = outside[moved >= size]
    return place


def _turned(value: np.ndarray, by: np.ndarray, size: int, seed: int) -> np.ndarray:
    """int64 in [0, size), size below 2^32: `value` moved on by a number that is a random function of `by`."""
    bits = (by.view(np.uint64) + np.uint64(seed)) * np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(32)
    bits *= np.uint64(0x94D049BB133111EB)
    bits >>= np.uint64(32)
    bits *= np.uint64(size)  # a share of the size instead of a remainder: divisions are slow
    bits >>= np.uint64(32)
    moved = bits.view(np.int64)
    moved += value
    moved -= (moved >= size) * np.int64(size)
    return moved
