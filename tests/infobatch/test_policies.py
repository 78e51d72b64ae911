"""Policies: unbiased weights, exact shares, and which samples they choose."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.core.rng import generator
from pretrain.infobatch.plan import Plan
from pretrain.infobatch.policies import POLICIES, Policy, SamplingRule, ScoreStats, checked, inclusion_probabilities

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


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30), st.floats(0.1, 1), st.floats(0, 1), st.booleans())
@settings(deadline=None)
def test_inclusion_probabilities_have_their_mean_and_are_proportional_between_their_bounds(
    sizes: list[float], share: float, low: float, counted: bool
) -> None:
    size, floor = torch.tensor([sizes, sizes[::-1]], dtype=torch.float64), low * share
    count = torch.randint(1, 9, size.shape, generator=generator(len(sizes))).double() if counted else None
    p = inclusion_probabilities(size, share, floor, count)
    n = torch.ones_like(size) if count is None else count
    assert torch.allclose((p * n).sum(dim=1) / n.sum(dim=1), torch.tensor(share, dtype=torch.float64), atol=1e-9)
    assert (p >= floor).all() and (p <= 1).all()
    for row, of in zip(p, size, strict=True):
        ratio = (row / of)[(row > floor + 1e-12) & (row < 1 - 1e-12)]
        assert not len(ratio) or torch.allclose(ratio, ratio[:1].expand_as(ratio))
        assert (row[of.argsort()].diff() >= -1e-12).all()


@given(policies, st.integers(1, 300), st.integers(0, 999))
@settings(deadline=None)
def test_every_sample_has_a_chance(policy: str, size: int, seed: int) -> None:
    """No weight exceeds what the floors allow, rounding aside: bands whose n / k is rounded have at least one of n."""
    score = scores(size, seed)
    rule = checked(ALL[policy](score, KNOWN))
    blind = policy in ("random", "importance, levels")  # they ignore scores, so unknown ones are like any other
    assert rule.keep.min() >= 0.2 and rule.unseen == (0.6 if blind else 1)
    if rule.density is not None:
        assert (rule.density / rule.density.mean()).min() >= 0.1
    if not blind:
        assert (plan(ALL[policy], score, seed).weight[score.isnan()] > 0).all()


@pytest.mark.parametrize("value", [0.1, 0.05, 1 / 3, 3.0, 1e-20, 1e20, 0.0])
def test_equal_scores_are_not_below_their_mean(value: float) -> None:
    score = torch.full((50_000,), value)
    assert plan(POLICIES["infobatch"], score).length == 50_000
    assert plan(ALL["importance, samples"], score).length == 30_000


def test_infobatch_is_the_published_rule() -> None:
    """Below the mean k of n are kept with weight n / k, all others with weight 1, also if many share a cell."""
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


def test_water_filling_has_the_least_variance_at_its_cost() -> None:
    """Of all shares with this mean, p ~ sqrt(score) has the least sum of score / p: any change makes it larger."""
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


def test_unreliable_scores_give_more_equal_shares() -> None:
    score = scores(5000, 4)
    rules = [SAMPLES(score, KNOWN._replace(reliability=r), share=0.5) for r in (1.0, 0.5, 0.0)]
    spread = [rule.keep.std().item() for rule in rules]
    assert spread[0] > spread[1] > 0.01 and spread[2] < 1e-6


# -- unbiased --------------------------------------------------------------------------------------


def gradient_error(policy: Policy, wrong: float = 1.0, ignore_scores: bool = False) -> float:
    """How many standard errors the mean weighted gradient is from the full one, at worst over parameters.

    Sixty kinds of samples, forty of each, with gradients of all sizes that depend on the level: three parameters that
    all of them affect, and one for each kind, so that no error of one kind is hidden by others. The scores are
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
        found = Plan(rule, score, (draw, 0), ignore_scores=ignore_scores)
        weight = found.weight.double()
        weight = torch.where((weight - 1).abs() > 1e-6, wrong * weight, weight)
        sums.append((weight * 3 * found.level.double() ** 2) @ x)  # 3 level^2 is 1 on average
    found, full = torch.stack(sums), x.sum(0)
    # A parameter of one kind may hardly vary; then only errors of levels and rounding remain.
    error = (found.mean(0) - full).abs() / (found.std(0) / draws**0.5).clamp(min=2e-3 * full)
    return error.max().item()


@pytest.mark.parametrize("policy", sorted(ALL))
def test_the_expected_weighted_gradient_is_the_full_one(policy: str) -> None:
    assert gradient_error(ALL[policy]) < 4.5


def test_the_expected_weighted_gradient_without_scores_is_the_full_one() -> None:
    assert gradient_error(ALL["importance, samples"], ignore_scores=True) < 4.5


@pytest.mark.parametrize("policy", sorted({*ALL} - {"full"}))
@pytest.mark.parametrize("wrong", [0.9, 1.1])
def test_a_wrong_weight_is_caught(policy: str, wrong: float) -> None:
    """The same measurement must detect weights a tenth too small or too large."""
    assert gradient_error(ALL[policy], wrong=wrong) > 4.5


# -- invalid sampling rules ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (torch.ones(3), "must be a SamplingRule"),
        (SamplingRule(torch.tensor([1.0, 0.5]), torch.ones(3)), "ascending"),
        (SamplingRule(torch.tensor([math.nan]), torch.ones(2)), "finite"),
        (SamplingRule(torch.tensor([1.0]), torch.ones(3)), "one share per band, 2"),
        (SamplingRule(torch.tensor([1.0]), torch.tensor([0.0, 1.0])), "so that every sample has a chance"),
        (SamplingRule(torch.tensor([1.0]), torch.tensor([0.5, 1.5])), "so that every sample has a chance"),
        (SamplingRule(torch.empty(0), torch.ones(1), 0.0), "unseen"),
        (SamplingRule(torch.empty(0), torch.ones(1), 1.0, torch.tensor([1.0, 0.0])), "density"),
        (SamplingRule(torch.empty(0), torch.ones(1), 1.0, torch.tensor([1.0, 1e-12])), "at least 0.001 of its mean"),
        (SamplingRule(torch.arange(500.0), torch.ones(501)), "at most 200"),
    ],
)
def test_an_invalid_sampling_rule_raises(rule: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(rule)


@given(st.integers(2, 32), st.floats(1e-9, 1.0), st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_a_density_below_a_thousandth_of_its_mean_is_refused(bins: int, least: float, scale: float) -> None:
    """Levels are drawn by 24-bit numbers: with less, a policy could starve a level, and the gradient be biased."""
    density = torch.ones(bins, dtype=torch.float64)
    density[0] = least
    rule = SamplingRule(torch.empty(0), torch.ones(1), 1.0, scale * density)
    if least / density.mean() < 0.000999:
        with pytest.raises(ValueError, match="density"):
            checked(rule)
    elif least / density.mean() > 0.001001:
        assert checked(rule).density is not None


@pytest.mark.parametrize("field", ["edges", "keep", "density"])
def test_a_list_in_place_of_a_tensor_raises(field: str) -> None:
    rule = SamplingRule(torch.tensor([0.5]), torch.tensor([0.5, 1.0]), 1.0, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=f"{field} must be a tensor, got list"):
        checked(rule._replace(**{field: getattr(rule, field).tolist()}))
