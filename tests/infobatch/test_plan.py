"""Plans: order, levels and weights."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.core.rng import generator
from pretrain.infobatch.plan import Plan
from pretrain.infobatch.policies import MAX_EDGES, POLICIES, Policy, SamplingRule, ScoreStats, checked

SHARE = {"random", "importance"}  # policies with a budget
ALL = {name: partial(policy, share=0.6) if name in SHARE else policy for name, policy in POLICIES.items()}
ALL["importance, levels"] = partial(POLICIES["importance"], share=0.6, over="levels")
ALL["importance, samples"] = partial(POLICIES["importance"], share=0.6, over="samples")
SAMPLES = partial(POLICIES["importance"], over="samples")
policies = st.sampled_from(sorted(ALL))
KNOWN = ScoreStats(torch.linspace(3, 0.1, 32, dtype=torch.float64), 0.8)


def scores(size: int, seed: int, unseen: float = 0.2) -> Tensor:
    """Over a range of sizes, some equal, some 0, some unknown (NaN)."""
    rng = generator(seed)
    score = torch.rand(size, generator=rng) ** 3 * 4
    score = torch.where(torch.rand(size, generator=rng) < 0.2, score.round(decimals=1), score)
    return score.masked_fill(torch.rand(size, generator=rng) < unseen, math.nan)


def plan(policy: Policy, score: Tensor, seed: int = 0, known: ScoreStats = KNOWN, **more: bool) -> Plan:
    return Plan(checked(policy(score, known)), score, (seed, 3), **more)


@given(policies, st.integers(1, 300), st.integers(0, 999), st.booleans())
@settings(deadline=None)
def test_ordered_samples_have_a_weight_and_weights_sum_to_the_size(
    policy: str, size: int, seed: int, ignore_scores: bool
) -> None:
    score = scores(size, seed)
    rule = checked(ALL[policy](score, KNOWN))
    found = Plan(rule, score, (seed, 3), ignore_scores=ignore_scores)
    order = found.order.tolist()
    assert len(order) == found.length == len({*order})
    assert sorted(order) == found.weight.nonzero().squeeze(1).tolist()
    by_sample = Plan(rule._replace(density=None), score, found.key, ignore_scores=ignore_scores).weight
    assert by_sample.double().sum().item() == pytest.approx(size, rel=1e-5)


@given(st.lists(st.floats(0, 10, width=32), max_size=MAX_EDGES, unique=True), st.integers(1, 500), st.integers(0, 99))
@settings(deadline=None)
def test_a_plan_uses_k_of_the_n_samples_of_each_band(edges: list[float], size: int, seed: int) -> None:
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
        assert abs(k - n * share[number]) < 1 or not room  # a band due less than one sample has one
        torch.testing.assert_close(found.weight[band == number].max(), n / k.float())


@given(st.integers(20, 3000), st.floats(0.5, 1), st.integers(0, 999), st.floats(0, 1))
@settings(deadline=None)
def test_a_share_is_met_exactly(size: int, share: float, seed: int, reliability: float) -> None:
    share = round(share * size) / size
    score = scores(size, seed, unseen=0.1)
    for policy in (SAMPLES, POLICIES["importance"]):
        found = plan(partial(policy, share=share), score, seed, KNOWN._replace(reliability=reliability))
        assert found.length == round(share * size)
    assert plan(partial(POLICIES["random"], share=share), score, seed).length == round(share * size)


def test_bands_due_less_than_one_sample_take_none_from_the_unseen() -> None:
    score = torch.cat([torch.arange(1.0, 41), torch.full((5,), math.nan)])
    found = Plan(SamplingRule(torch.arange(1.5, 40), torch.full((40,), 0.3).double()), score, (0, 0))
    assert (found.weight == 1).all() and found.length == 45  # the sample of a band of one can't be left out forever


def test_all_subsets_of_k_are_equally_likely() -> None:
    """2 of 5 drawn without replacement: ten pairs, 100 times each, by chi squared."""
    count: dict[tuple[int, ...], int] = {}
    score = torch.ones(5)
    for draw in range(1000):
        kept = tuple(
            sorted(Plan(SamplingRule(torch.empty(0), torch.tensor([0.4]).double()), score, (draw, 1)).order.tolist())
        )
        count[kept] = count.get(kept, 0) + 1
    assert len(count) == 10
    assert sum((c - 100) ** 2 / 100 for c in count.values()) < 27.9  # one in a thousand, 9 degrees


def test_pruning_none_is_the_full_plan() -> None:
    score = scores(999, 0, unseen=0)
    none, full = plan(partial(POLICIES["infobatch"], prune_ratio=0.0), score), plan(POLICIES["full"], score)
    assert torch.equal(none.order, full.order) and torch.equal(none.weight, full.weight)
    assert torch.equal(none.level, full.level)


def discrepancy(level: Tensor) -> float:
    """Largest distance of the empirical distribution from the uniform one."""
    ordered = level.double().sort().values
    return (ordered - (torch.arange(len(level)) + 0.5) / len(level)).abs().max().item()


def test_levels_are_stratified_over_samples_and_over_epochs() -> None:
    size, epochs = 4000, 16
    full = POLICIES["full"](torch.ones(size), KNOWN)
    levels = torch.stack([Plan(full, torch.ones(size), (5, epoch)).level for epoch in range(epochs)])
    assert levels.min() >= 0 and levels.max() < 1
    random = discrepancy(torch.rand(size, generator=generator(0)))
    for epoch in levels:
        assert discrepancy(epoch) < min(3e-3, random / 3)
        for start in range(0, size, 400):  # also among neighbours in the data set, for example of one class
            assert discrepancy(epoch[start : start + 400]) < 0.02
    for sample in levels[:, ::97].T:
        assert discrepancy(sample) < 0.12  # 16 uniform draws: 0.2 on average
    assert levels.sort(dim=0).values.diff(dim=0).min() > 1 / 60


def test_levels_depend_on_the_seed() -> None:
    score = torch.ones(1000)
    first, second = (Plan(POLICIES["full"](score, KNOWN), score, (seed, 0)).level for seed in (0, 1))
    assert (first - second).abs().min() > 1e-4
    assert (
        torch.stack([Plan(POLICIES["full"](score[:3], KNOWN), score[:3], (s, 0)).level for s in range(500)])
        .mean(0)
        .sub(0.5)
        .abs()
        .max()
        < 5 * (1 / 12 / 500) ** 0.5
    )


def test_levels_follow_the_density_and_weigh_one_over_it() -> None:
    score = torch.ones(50_000)
    found = plan(partial(POLICIES["importance"], share=1.0, over="levels"), score)
    level, weight = found.level, found.weight
    root = KNOWN.level.sqrt()
    density = 0.1 + 0.9 * root / root.mean()
    share = torch.bincount((level * 32).long(), minlength=32) / 50_000
    torch.testing.assert_close(share.double(), density / 32, rtol=2e-2, atol=0)
    torch.testing.assert_close(weight.double(), 1 / density[(level * 32 - 1e-6).clamp(min=0).long()], rtol=0.3, atol=0)
    for power in (0, 1, 2, 3):  # the mean over uniform levels, regardless of the density
        assert (weight * level**power).mean().item() == pytest.approx(1 / (power + 1), rel=2e-3)
