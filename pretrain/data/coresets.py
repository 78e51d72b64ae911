"""Coresets: which samples represent a data set, by their features.

Every function returns indices, and takes float32 features [N, D] on the CPU. None needs an N x N matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.core.rng import generator
from pretrain.infobatch.stratified import round_sizes

BINS = 10  # of `graphcut`
MIN_PER_CLUSTER, MAX_CLUSTERS = 8, 256  # kept samples of a cluster of `stratified`, on average; clusters
UNIFORM = 0.5  # part of a cluster's share that does not depend on its spread, which bounds the weights
ITERATIONS = 25  # of k-means, at most
CHUNK = 8192  # rows whose distances to all centres are in memory at once


class Coreset(NamedTuple):
    """The selected samples.

    Attributes:
        index: int64 [count].
        weights: float64 [count]; one over the probability with which each was drawn. None: all alike.
    """

    index: Tensor
    weights: Tensor | None = None


def random(size: int, count: int, seed: int) -> Coreset:
    """A uniform subset of `count` of `size` samples: unbiased over seeds, but a training sees one fixed draw."""
    return Coreset(torch.randperm(size, generator=generator(seed, 0))[:count])


def kcenter(feature: Tensor, count: int, seed: int) -> Coreset:
    """Greedy k-center: always the sample that is farthest from those selected (Sener and Savarese 2018, algorithm 1).

    The first one is drawn by the seed. Biased: it selects outliers first. O(N count D).
    """
    x, distance = _centred(feature), torch.full((len(feature),), torch.inf)
    norm = x.square().sum(1)
    index = torch.empty(count, dtype=torch.int64)
    place = torch.randint(len(x), (), generator=generator(seed, 0))
    for n in range(count):
        index[n] = place
        distance = torch.minimum(distance, torch.addmv(norm, x, x[place], alpha=-2).add_(norm[place]))
        distance[place] = -torch.inf  # of equal samples none is selected twice
        place = distance.argmax()
    return Coreset(index)


def graphcut(feature: Tensor, count: int, seed: int) -> Coreset:
    """The bins of Dataset Quantization (Zhou et al., ICCV 2023), and the same share of each, drawn uniformly.

    See `graphcut_bins`. The paper's text was not at hand: the gain, and the steps from bins to a subset, are from
    secondary sources, as is the default of ten bins; its removal of image patches is left out. The draw is systematic:
    every sample is selected with probability count / N exactly, and no bin is more than one off its share, so the
    subset is unbiased over seeds without weights.
    """
    size = len(feature)
    draw = generator(seed, 0)
    shuffled = [bin[torch.randperm(len(bin), generator=draw)] for bin in graphcut_bins(feature, min(BINS, size))]
    start = torch.randint(size, (), generator=draw)
    return Coreset(torch.cat(shuffled)[(start + torch.arange(count) * size) // count])


def graphcut_bins(feature: Tensor, bins: int) -> list[Tensor]:
    """Cut N samples into bins of N / bins each, greedily: early bins are representative, late ones diverse.

    A bin S starts empty, and the sample x of the rest R (of those in no bin yet) with the largest gain

        sum over p in S of |f(p) - f(x)|^2  -  sum over p in R of |f(p) - f(x)|^2

    is added to it until it is full. Since the sum of |p - x|^2 over a set A is |A| |x|^2 - 2 x . (sum of A) + a
    constant, a step costs one product of the rest's features with the sample added last: O(N^2 D / 2) in all.

    Returns:
        int64 [bins] of about N / bins each; the samples in the order in which they were added (in the last bin, where
        the order does not matter, in ascending order).
    """
    x, rest, found = _centred(feature), torch.arange(len(feature)), []
    for size in [len(part) for part in rest.tensor_split(bins)][:-1]:
        y = x[rest]
        norm = y.square().sum(1).double()
        dot = 2 * (y @ y.sum(0)).double()  # 2 x . (sum of R - sum of S)
        taken, added = torch.zeros(len(rest), dtype=torch.bool), torch.empty(size, dtype=torch.int64)
        for n in range(size):
            gain = torch.add(dot, norm, alpha=2 * n - len(rest))
            place = gain.masked_fill_(taken, -torch.inf).argmax()
            added[n], taken[place] = rest[place], True
            dot -= 4 * (y @ y[place])
        found.append(added)
        rest = rest[~taken]
    return [*found, rest]


def stratified(feature: Tensor, count: int, seed: int) -> Coreset:
    """Some samples of every k-means cluster: k of its n, drawn uniformly without replacement, each weighing n / k.

    Every sample is drawn with probability k / n, so weighted sums over the subset are unbiased for all samples (Cochran
    1977, chapter 5). Half of a cluster's share is proportional to its size, half to its size times its spread, which
    alone would be Neyman's allocation, the one of least variance for the mean of the features; so but for rounding no
    weight is more than twice their mean. There is a cluster for every 8 kept samples, at most 256.
    """
    x = _centred(feature)
    cluster = kmeans(x, min(max(count // MIN_PER_CLUSTER, 1), MAX_CLUSTERS), seed)
    n = torch.bincount(cluster)
    centre = torch.zeros(len(n), x.shape[1]).index_add_(0, cluster, x) / n[:, None]
    square = torch.zeros(len(n)).index_add_(0, cluster, (x - centre[cluster]).square().sum(1)) / n
    k = allocation(n, square.sqrt().double(), count)
    draw = torch.rand(len(x), generator=generator(seed, 0), dtype=torch.float64)
    order = draw.argsort()
    order = order[cluster[order].argsort(stable=True)]  # by cluster, and in random order within
    rank = torch.arange(len(x)) - (n.cumsum(0) - n)[cluster[order]]
    index = order[rank < k[cluster[order]]]
    return Coreset(index, (n / k)[cluster[index]])


def allocation(n: Tensor, spread: Tensor, count: int) -> Tensor:
    """float64 [clusters]; how many of the n samples of each are drawn, at least one and `count` in all.

    Args:
        n: int64 [clusters]; samples of each.
        spread: float64 [clusters]; standard deviation of each.
        count: samples to draw, at least as many as there are clusters and at most the sum of n.
    """
    n = n.double()
    mean = (n * spread).sum() / n.sum()
    wanted = n * (UNIFORM + (1 - UNIFORM) * spread / mean if mean > 0 else torch.ones_like(spread))
    expected, full = torch.zeros_like(n), torch.zeros(len(n), dtype=torch.bool)
    while True:  # clusters whose share exceeds them are taken whole, and the others share the rest
        left = count - n[full].sum()
        expected = torch.where(full, n, wanted * left / wanted[~full].sum().clamp(min=1e-300))
        if not (over := ~full & (expected > n)).any():
            return round_sizes(expected, n)
        full |= over


def kmeans(x: Tensor, clusters: int, seed: int) -> Tensor:
    """int64 [N] in [0, K); Lloyd's k-means of x, float32 [N, D], begun at random samples; K is at most `clusters`.

    Clusters that become empty are left out.
    """
    centre = x[torch.randperm(len(x), generator=generator(seed, 1))[:clusters]]
    found = torch.full((len(x),), -1)
    for _ in range(ITERATIONS):
        norm = centre.square().sum(1)
        nearest = torch.cat([torch.addmm(norm, part, centre.T, alpha=-2).argmin(1) for part in x.split(CHUNK)])
        if torch.equal(nearest, found):
            break
        _, found, count = nearest.unique(return_inverse=True, return_counts=True)
        centre = torch.zeros(len(count), x.shape[1]).index_add_(0, found, x) / count[:, None]
    return found


def _centred(feature: Tensor) -> Tensor:
    """Features minus their mean: distances stay, and lose fewer digits as differences of squares."""
    return feature - feature.mean(0, dtype=torch.float64).float()
