"""Policies and the plans they make: unbiased, exact, quick to hold; over random inputs."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.core.rng import generator
from pretrain.infobatch.plan import Plan, permuted
from pretrain.infobatch.policies import MOST_EDGES, POLICIES, Policy, SamplingRule, ScoreStats, checked, histogram

SHARE = {"random", "importance"}  # policies that keep to a share
ALL = {name: partial(policy, share=0.6) if name in SHARE else policy for name, policy in POLICIES.items()}
ALL["importance, levels"] = partial(POLICIES["importance"], share=0.6, over="levels")
ALL["importance, samples"] = partial(POLICIES["importance"], share=0.6, over="samples")
SAMPLES = partial(POLICIES["importance"], over="samples")
policies = st.sampled_from(sorted(ALL))
KNOWN = ScoreStats(torch.linspace(3, 0.1, 32, dtype=torch.float64), 0.8)


def scores(size: int, seed: int, unseen: float = 0.2) -> Tensor:
    """Of all sizes, some equal, some nought, some never visited."""
    rng = generator(seed)
    score = torch.rand(size, generator=rng) ** 3 * 4
    score = torch.where(torch.rand(size, generator=rng) < 0.2, score.round(decimals=1), score)
    return score.masked_fill(torch.rand(size, generator=rng) < unseen, math.nan)


def plan(policy: Policy, score: Tensor, seed: int = 0, known: ScoreStats = KNOWN, **more: bool) -> Plan:
    return Plan(checked(policy(score, known)), score, (seed, 3), **more)


# -- who is kept -----------------------------------------------------------------------------------


@given(policies, st.integers(1, 300), st.integers(0, 999), st.booleans())
@settings(deadline=None)
def test_the_order_is_who_has_a_weight_and_weights_of_samples_sum_to_the_size(
    policy: str, size: int, seed: int, at_random: bool
) -> None:
    score = scores(size, seed)
    rule = checked(ALL[policy](score, KNOWN))
    found = Plan(rule, score, (seed, 3), at_random=at_random)
    order = found.order.tolist()
    assert len(order) == found.length == len({*order})
    assert sorted(order) == found.weight.nonzero().squeeze(1).tolist()
    by_sample = Plan(rule._replace(density=None), score, found.clock, at_random=at_random).weight
    assert by_sample.double().sum().item() == pytest.approx(size, rel=1e-5)


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


@given(st.integers(20, 3000), st.floats(0.5, 1), st.integers(0, 999), st.floats(0, 1))
@settings(deadline=None)
def test_a_share_is_met_to_the_visit(size: int, share: float, seed: int, reliability: float) -> None:
    share = round(share * size) / size
    score = scores(size, seed, unseen=0.1)
    for policy in (SAMPLES, POLICIES["importance"]):
        found = plan(partial(policy, share=share), score, seed, KNOWN._replace(reliability=reliability))
        assert found.length == round(share * size)
    assert plan(partial(POLICIES["random"], share=share), score, seed).length == round(share * size)


@given(policies, st.integers(1, 300), st.integers(0, 999))
@settings(deadline=None)
def test_nobody_starves(policy: str, size: int, seed: int) -> None:
    """No weight exceeds what the floors allow, rounding aside: bands whose n / k is rounded have at least one of n."""
    score = scores(size, seed)
    rule = checked(ALL[policy](score, KNOWN))
    blind = policy in ("random", "importance, levels")  # to scores: those never visited are like any other
    assert rule.keep.min() >= 0.2 and rule.unseen == (0.6 if blind else 1)
    if rule.density is not None:
        assert (rule.density / rule.density.mean()).min() >= 0.1
    if not blind:
        assert (plan(ALL[policy], score, seed).weight[score.isnan()] > 0).all()


def test_bands_that_are_due_less_than_a_visit_take_none_from_the_unseen() -> None:
    score = torch.cat([torch.arange(1.0, 41), torch.full((5,), math.nan)])
    found = Plan(SamplingRule(torch.arange(1.5, 40), torch.full((40,), 0.3).double()), score, (0, 0))
    assert (found.weight == 1).all() and found.length == 45  # nobody of a band of one can be left out for ever


@pytest.mark.parametrize("value", [0.1, 0.05, 1 / 3, 3.0, 1e-20, 1e20, 0.0])
def test_equal_scores_are_not_below_their_mean(value: float) -> None:
    score = torch.full((50_000,), value)
    assert plan(POLICIES["infobatch"], score).length == 50_000
    assert plan(ALL["importance, samples"], score).length == 30_000


def test_infobatch_is_the_published_rule() -> None:
    """Below the mean k of n are kept and weigh n / k, all others weigh 1, also where many share the mean's cell."""
    score = (1 + torch.randn(10_000, generator=generator(2)) * 1e-3).float()
    low = score < score.double().mean()
    weight = plan(partial(POLICIES["infobatch"], prune_ratio=0.3), score).weight
    n, k = low.sum().item(), (weight[low] > 0).sum().item()
    assert k == round(0.7 * n) and (weight[~low] == 1).all()
    assert {*weight[low].tolist()} == {0.0, torch.tensor(n / k).item()}


def test_quantiles_are_exact() -> None:
    score = scores(5000, 1, unseen=0)
    weight = plan(POLICIES["quantile"], score).weight
    ordered = score.sort().values
    for low, high, share in ((0, 1000, 0.25), (1000, 4250, 0.5), (4250, 5000, 1.0)):
        inside = (score >= ordered[low]) & (score < (ordered[high] if high < 5000 else math.inf))
        assert (weight[inside] > 0).float().mean() == pytest.approx(share, abs=1e-3)


def test_water_filling_is_the_best_of_its_cost() -> None:
    """Of all shares with this mean, p ~ sqrt(score) has the least sum of score / p: moving any bit makes it more."""
    score = scores(20_000, 3, unseen=0)
    rule = SAMPLES(score, KNOWN._replace(reliability=1.0), share=0.4, floor=0.05)
    band = torch.bucketize(score, rule.edges, right=True)
    n = torch.bincount(band).double()
    mean = torch.bincount(band, score.double()) / n
    assert ((n * rule.keep).sum() / n.sum()).item() == pytest.approx(0.4)
    assert (rule.keep.diff() >= 0).all()
    free = ((rule.keep > 0.051) & (rule.keep < 1)).nonzero().squeeze(1).tolist()
    assert len(free) > 20

    def cost(keep: Tensor) -> float:
        return (n * mean / keep).sum().item()

    for a, b in itertools.pairwise(free):
        for sign in (1, -1):
            moved = rule.keep.clone()
            moved[a] += sign * 0.01 * moved[a]
            moved[b] -= sign * 0.01 * rule.keep[a] * n[a] / n[b]
            assert cost(moved) > cost(rule.keep) * (1 - 1e-6)


def test_scores_that_are_not_reliable_are_drawn_together() -> None:
    score = scores(5000, 4)
    rules = [SAMPLES(score, KNOWN._replace(reliability=r), share=0.5) for r in (1.0, 0.5, 0.0)]
    spread = [rule.keep.std().item() for rule in rules]
    assert spread[0] > spread[1] > 0.01 and spread[2] < 1e-6


@given(st.integers(1, 400), st.integers(0, 99))
@settings(deadline=None)
def test_histogram_counts_everybody_seen(size: int, seed: int) -> None:
    score = scores(size, seed)
    count, middle = histogram(score)
    assert count.sum() == (~score.isnan()).sum()
    assert (count * middle).sum().item() == pytest.approx(score.nansum().item(), rel=5e-3, abs=1e-9)


# -- unbiased --------------------------------------------------------------------------------------


def gradient_error(policy: Policy, wrong: float = 1.0, at_random: bool = False) -> float:
    """How many standard errors the mean weighted gradient is from the full one, at worst over parameters.

    Sixty kinds of samples, forty of each, with gradients of all sizes that depend on the level: three parameters that
    all of them move, and one that each kind has for itself, so that no kind hides behind another. The scores are
    correlated with the gradients. `wrong` multiplies the weights that are not 1.
    """
    kinds, rng, draws = 60, generator(5), 100
    x = torch.cat([torch.rand(kinds, 3, generator=rng) ** 2 * 3, torch.eye(kinds)], dim=1).double()
    residual = torch.randn(kinds, generator=rng).double().exp()
    score = (residual / residual.mean()).float()
    score[::9] = math.nan
    x, residual, score = (part.repeat_interleave(40, 0) for part in (x * residual[:, None], residual, score))
    rule = checked(policy(score, KNOWN))
    sums = []
    for draw in range(draws):
        found = Plan(rule, score, (draw, 0), at_random=at_random)
        weight = found.weight.double()
        weight = torch.where((weight - 1).abs() > 1e-6, wrong * weight, weight)
        sums.append((weight * 3 * found.level.double() ** 2) @ x)  # 3 level^2 is 1 on average
    found, full = torch.stack(sums), x.sum(0)
    # A parameter of one kind may hardly vary: what is left then are the levels' and the floats' own errors.
    error = (found.mean(0) - full).abs() / (found.std(0) / draws**0.5).clamp(min=2e-3 * full)
    return error.max().item()


@pytest.mark.parametrize("policy", sorted(ALL))
def test_the_expected_weighted_gradient_is_the_full_one(policy: str) -> None:
    assert gradient_error(ALL[policy]) < 4.5


def test_also_where_the_scores_are_left_out() -> None:
    assert gradient_error(ALL["importance, samples"], at_random=True) < 4.5


@pytest.mark.parametrize("policy", sorted({*ALL} - {"full"}))
@pytest.mark.parametrize("wrong", [0.9, 1.1])
def test_a_wrong_weight_is_caught(policy: str, wrong: float) -> None:
    """The same measurement must see through weights a tenth too small or too large."""
    assert gradient_error(ALL[policy], wrong=wrong) > 4.5


def test_every_set_of_k_is_as_likely() -> None:
    """2 of 5 drawn without replacement: ten pairs, 300 times each, by chi squared."""
    count: dict[tuple[int, ...], int] = {}
    score = torch.ones(5)
    for draw in range(3000):
        kept = tuple(
            sorted(Plan(SamplingRule(torch.empty(0), torch.tensor([0.4]).double()), score, (draw, 1)).order.tolist())
        )
        count[kept] = count.get(kept, 0) + 1
    assert len(count) == 10
    assert sum((c - 300) ** 2 / 300 for c in count.values()) < 27.9  # one in a thousand, 9 degrees


# -- order -----------------------------------------------------------------------------------------


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


def test_skipping_nobody_is_everybody_to_the_bit() -> None:
    score = scores(999, 0, unseen=0)
    none, full = plan(partial(POLICIES["infobatch"], prune_ratio=0.0), score), plan(POLICIES["full"], score)
    assert torch.equal(none.order, full.order) and torch.equal(none.weight, full.weight)
    assert torch.equal(none.level, full.level)


# -- levels ----------------------------------------------------------------------------------------


def discrepancy(level: Tensor) -> float:
    """Largest distance of the empirical distribution from the uniform one."""
    ordered = level.double().sort().values
    return (ordered - (torch.arange(len(level)) + 0.5) / len(level)).abs().max().item()


def test_levels_are_stratified_and_a_samples_visits_are_spread() -> None:
    size, epochs = 4000, 16
    full = POLICIES["full"](torch.ones(size), KNOWN)
    levels = torch.stack([Plan(full, torch.ones(size), (5, epoch)).level for epoch in range(epochs)])
    assert levels.min() >= 0 and levels.max() < 1
    random = discrepancy(torch.rand(size, generator=generator(0)))
    for epoch in levels:
        assert discrepancy(epoch) < min(3e-3, random / 3)
        for start in range(0, size, 400):  # also among neighbours in the data set, of one class say
            assert discrepancy(epoch[start : start + 400]) < 0.02
    for sample in levels[:, ::97].T:
        assert discrepancy(sample) < 0.12  # 16 uniform draws: 0.2 on average
    assert levels.sort(dim=0).values.diff(dim=0).min() > 1 / 60


def test_levels_of_other_seeds_are_others() -> None:
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
    for power in (0, 1, 2, 3):  # the mean over uniform levels, in spite of the density
        assert (weight * level**power).mean().item() == pytest.approx(1 / (power + 1), rel=2e-3)


# -- what a policy may not say ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (torch.ones(3), "a Rule"),
        (SamplingRule(torch.tensor([1.0, 0.5]), torch.ones(3)), "ascending"),
        (SamplingRule(torch.tensor([math.nan]), torch.ones(2)), "finite"),
        (SamplingRule(torch.tensor([1.0]), torch.ones(3)), "one share a band, 2"),
        (SamplingRule(torch.tensor([1.0]), torch.tensor([0.0, 1.0])), "nobody may starve"),
        (SamplingRule(torch.tensor([1.0]), torch.tensor([0.5, 1.5])), "nobody may starve"),
        (SamplingRule(torch.empty(0), torch.ones(1), 0.0), "unseen"),
        (SamplingRule(torch.empty(0), torch.ones(1), 1.0, torch.tensor([1.0, 0.0])), "density"),
        (SamplingRule(torch.arange(500.0), torch.ones(501)), "at most 200"),
    ],
)
def test_a_rule_that_is_none_is_refused(rule: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked(rule)
