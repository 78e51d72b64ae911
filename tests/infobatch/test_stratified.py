"""Stratified sampling: each function against a straightforward version in numpy."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.core.rng import generator
from pretrain.infobatch.plan import Plan
from pretrain.infobatch.policies import MOST_EDGES, SamplingRule


def scores(size: int, seed: int, unseen: float = 0.2) -> Tensor:
    """Of all sizes, some equal, some nought, some never visited."""
    rng = generator(seed)
    score = torch.rand(size, generator=rng) ** 3 * 4
    score = torch.where(torch.rand(size, generator=rng) < 0.2, score.round(decimals=1), score)
    return score.masked_fill(torch.rand(size, generator=rng) < unseen, math.nan)


@given(st.lists(st.floats(0, 10, width=32), max_size=MOST_EDGES, unique=True), st.integers(1, 500), st.integers(0, 99))
@settings(deadline=None)
def test_bands_are_what_comparing_says(edges: list[float], size: int, seed: int) -> None:
    """K of the n in every band, whatever the edges: many in one cell, or equal to scores, or -0."""
    rng = generator(seed)
    score = scores(size, seed)
    limits = torch.tensor(sorted({e + 0.0 for e in edges}))
    for number, edge in enumerate(limits.tolist()[:20]):
        score[number % size] = edge
    score[0] = -0.0
    keep = torch.rand(len(limits) + 1, generator=rng, dtype=torch.float64).clamp(min=0.1)
    found = Plan(SamplingRule(limits, keep, 0.5), score, (seed, 0))
    band = torch.tensor([sum(s >= e for e in limits.tolist()) for s in score.tolist()])
    band[score.isnan()] = len(keep)
    share = torch.cat([keep, torch.tensor([0.5])])
    room = (torch.bincount(band, minlength=len(share)) * share)[band.unique()].min() >= 1
    for number in band.unique():
        n, k = (band == number).sum(), (found.weight[band == number] > 0).sum()
        assert k >= 1
        assert abs(k - n * share[number]) < 1 or not room  # one that is due less than one visit has one all the same
        torch.testing.assert_close(found.weight[band == number].max(), n / k.float())
