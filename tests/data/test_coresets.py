"""Selecting coresets: each method against a straightforward version, over random features."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.core.rng import generator
from pretrain.data import coresets

METHODS = {
    "random": lambda feature, count, seed: coresets.random(len(feature), count, seed),
    "kcenter": coresets.kcenter,
    "graphcut": coresets.graphcut,
    "stratified": coresets.stratified,
}


def features(seed: int, size: int, width: int = 3) -> Tensor:
    return torch.randn(size, width, generator=generator(seed)) + 5


def distances(feature: Tensor) -> Tensor:
    """Squared, [N, N]."""
    return (feature[:, None].double() - feature).square().sum(2)


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 60), share=st.floats(0, 1), width=st.integers(1, 4))
@settings(deadline=None, max_examples=8)
def test_the_seed_alone_decides_which_samples_are_selected(
    method: str, seed: int, size: int, share: float, width: int
) -> None:
    """As many as are wanted, each once, also where many samples are equal; weights sum to the size."""
    feature, count = features(seed, size, width), max(1, round(share * size))
    feature = feature.round() if seed % 2 else feature
    first, second = (METHODS[method](feature, count, seed) for _ in range(2))
    assert torch.equal(first.index, second.index) and first.index.unique().shape == (count,)
    assert first.index.min() >= 0 and first.index.max() < size
    assert (first.weights is not None) == (method == "stratified")
    if first.weights is not None:
        assert first.weights.sum().item() == pytest.approx(size) and (first.weights >= 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_other_seeds_select_other_samples(method: str) -> None:
    found = {tuple(METHODS[method](features(0, 60), 20, seed).index.sort().values.tolist()) for seed in range(8)}
    assert len(found) > 5


@given(st.integers(0, 10**6), st.integers(2, 40))
@settings(deadline=None, max_examples=8)
def test_kcenter_always_takes_the_farthest_sample(seed: int, size: int) -> None:
    feature = features(seed, size)
    index, distance = coresets.kcenter(feature, size, seed).index.tolist(), distances(feature)
    for n in range(1, size - 1):
        nearest = distance[:, index[:n]].amin(1)
        assert nearest[index[n]] == pytest.approx(nearest.max().item(), rel=1e-4, abs=1e-5)


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 6))
@settings(deadline=None, max_examples=8)
def test_graphcut_always_adds_the_sample_of_the_largest_gain(seed: int, size: int, bins: int) -> None:
    feature, bins = features(seed, size), min(bins, size)
    found, distance = coresets.graphcut_bins(feature, bins), distances(feature)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(size))
    assert {len(bin) for bin in found} <= {size // bins, -(-size // bins)}
    rest = {*range(size)}
    for bin in found[:-1]:
        chosen: list[int] = []
        for sample in bin.tolist():
            gain = {x: (distance[x, chosen].sum() - distance[x, [*rest]].sum()).item() for x in rest}
            assert gain[sample] == pytest.approx(max(gain.values()), rel=1e-4, abs=1e-4)
            chosen.append(sample)
            rest.remove(sample)


def test_graphcut_selects_every_sample_equally_often_and_every_bin_by_its_share() -> None:
    feature, times, draws = features(0, 33), torch.zeros(33), 100
    bins = coresets.graphcut_bins(feature, 10)
    for seed in range(draws):
        index = coresets.graphcut(feature, 14, seed).index
        times[index] += 1
        assert all(abs(torch.isin(bin, index).sum() - len(bin) * 14 / 33) < 1 for bin in bins)
    share = 14 / 33
    assert ((times / draws - share).abs() < 4.5 * (share * (1 - share) / draws) ** 0.5).all()


@given(st.integers(0, 10**6), st.integers(1, 80), st.integers(1, 9))
@settings(deadline=None, max_examples=8)
def test_k_means_clusters_are_those_of_the_nearest_means(seed: int, size: int, clusters: int) -> None:
    feature = features(seed, size) - 5
    found = coresets.kmeans(feature, clusters, seed)
    names = found.unique()
    assert torch.equal(names, torch.arange(len(names))) and len(names) <= clusters
    mean = torch.stack([feature[found == name].mean(0) for name in names])
    nearest = (feature[:, None] - mean).square().sum(2)
    own = nearest[torch.arange(size), found]
    assert (own <= nearest.amin(1) + 1e-5).all()


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 5)), min_size=1, max_size=12), st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_an_allocation_takes_some_of_every_cluster(clusters: list[tuple[int, float]], share: float) -> None:
    n, spread = (torch.tensor(column) for column in zip(*clusters, strict=True))
    count = len(n) + round(share * int(n.sum() - len(n)))
    k = coresets.allocation(n, spread.double(), count)
    assert k.sum() == count and (k >= 1).all() and (k <= n).all()
    assert (k >= (0.5 * n * count / n.sum()).floor()).all()  # no weight far above twice the mean
