"""Weights of samples, beside those of the plan."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain import InfoBatch
from pretrain.core.rng import generator
from pretrain.data.coresets import Coreset, stratified

POLICIES = {
    "full": {},
    "random": {"budget": 0.5},
    "infobatch": {"anneal": 0},
    "quantile": {"anneal": 0},
    "importance": {"budget": 0.6},
}


def batches(infobatch: InfoBatch, size: int = 7) -> list[Tensor]:
    index = list(infobatch)
    return [torch.tensor(index[start : start + size]) for start in range(0, len(index), size)]


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=3)
def test_weights_multiply_the_loss_and_change_nothing_else(policy: str, seed: int) -> None:
    """Plans and scores are those without weights; with all ones every number is, bit for bit."""
    losses, weights = torch.rand(2, 50, generator=generator(seed)) + 0.1
    options = {"epochs": 4, "policy": policy, "seed": seed, "warn": str, **POLICIES[policy]}
    plain, ones, mine = (InfoBatch(50, weights=w, **options) for w in (None, torch.ones(50), 3 * weights))
    for _ in zip(plain.epochs(), ones.epochs(), mine.epochs(), strict=True):
        total = torch.zeros(2, dtype=torch.float64)
        for index in batches(plain):
            loss, weight = losses[index], plain.weight(index)
            assert torch.equal(ones.weight(index), weight)
            torch.testing.assert_close(mine.weight(index), 3 * weights[index] * weight)
            total += torch.stack([(weight * weights[index] * loss).sum(), (weight * weights[index]).sum()])
            second = (mine.weight(index) * loss).mean()
            expected = plain(loss, index)
            assert torch.equal(ones(loss, index), expected)
            torch.testing.assert_close(mine(loss, index), second)
        assert ones.mean() == plain.mean() and mine.mean() == pytest.approx((total[0] / total[1]).item(), rel=1e-5)
    assert mine.samples_used == plain.samples_used
    assert torch.equal(mine.score.nan_to_num(), plain.score.nan_to_num())
    assert mine.reliability == plain.reliability and torch.equal(mine.scores.levels.sums, plain.scores.levels.sums)


def test_ranks_weigh_as_one_process() -> None:
    losses, weights = torch.rand(2, 11, generator=generator(1)) + 0.1
    one, *two = (
        InfoBatch(11, epochs=1, policy="full", weights=weights, rank=rank, world=world, merge=lambda table: table)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    for each in (one, *two):
        next(each.epochs())
    index = torch.tensor([list(each) for each in two])  # the last entry of the second is padding
    whole = one(losses[torch.tensor(list(one))], list(one))
    parts = [each(losses[row ^ (row >> 63)], row) for each, row in zip(two, index, strict=True)]
    torch.testing.assert_close(sum(parts) / 2, whole)


@cache
def subsets(size: int, count: int, seeds: int) -> tuple[Tensor, list[Coreset]]:
    """Features float32 [size, 3], and stratified subsets by them."""
    feature = torch.randn(size, 3, generator=generator(0)) * torch.arange(1, size + 1)[:, None] / size
    return feature, [stratified(feature, count, seed) for seed in range(seeds)]


def error_of_estimates(policy: str, wrong: str = "", seeds: int = 25) -> float:
    """The mean weighted loss of an epoch on a stratified subset, over draws of both, in standard errors from that of
    all samples. Losses depend on the sample, whose features they follow, and on the level."""
    size, count = 240, 72
    feature, drawn = subsets(size, count, seeds)
    scale = 0.2 + feature.norm(dim=1)
    truth, found = 1.5 * scale.mean().item(), []
    for seed, (index, weights) in enumerate(drawn):
        assert weights is not None and abs(weights.sum().item() - size) < 1e-9
        weights = {"": weights, "none": None, "squared": weights.square() * size / weights.square().sum()}[wrong]
        options = {"epochs": 2, "policy": policy, "seed": seed, "warn": str, **POLICIES[policy]}
        infobatch = InfoBatch(count, weights=weights, **options)
        for epoch in infobatch.epochs():
            place = torch.tensor(list(infobatch))
            loss = scale[index[place]] * (1 + 2 * (infobatch.level(place) - 0.25))
            weighted = infobatch(loss, place) * infobatch.length / (count if weights is None else size)
            if epoch == 1:
                found.append(weighted.item())
    found = torch.tensor(found, dtype=torch.float64)
    return ((found.mean() - truth) / found.std() * seeds**0.5).item()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stratified_subset_is_unbiased_for_all_samples_under_every_policy(policy: str) -> None:
    assert abs(error_of_estimates(policy)) < 4


@pytest.mark.parametrize("wrong", ["none", "squared"])
def test_wrong_weights_are_caught(wrong: str) -> None:
    assert abs(error_of_estimates("full", wrong)) > 8


@given(st.integers(0, 30), st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_a_state_is_of_its_weights(stop: int, seed: int) -> None:
    """Resumed with them the rest is the same; with others, or without, it is refused and nothing has changed."""
    losses, weights = torch.rand(2, 23, generator=generator(seed)) + 0.1
    whole, first, again = (InfoBatch(23, epochs=3, seed=seed, weights=weights) for _ in range(3))
    expected = [float(whole(losses[i], i)) for _ in whole.epochs() for i in batches(whole, 5)]
    found = []
    for _ in first.epochs():
        for index in batches(first, 5):
            if len(found) < stop:
                found.append(float(first(losses[index], index)))
        if len(found) >= stop:
            break
    state = first.state_dict()
    for other in (None, weights.flip(0)):
        refusing = InfoBatch(23, epochs=3, seed=seed, weights=other)
        with pytest.raises(ValueError, match="with other weights of samples"):
            refusing.load_state_dict(state)
        with pytest.raises(ValueError, match="weights"):
            again.load_state_dict(refusing.state_dict())
    again.load_state_dict(state)
    found += [float(again(losses[i], i)) for _ in again.epochs() for i in batches(again, 5)]
    assert found == expected


def test_ranks_with_other_weights_are_noticed() -> None:
    marks = []
    for weights in (None, torch.ones(9), torch.arange(1, 10)):
        infobatch = InfoBatch(9, epochs=1, weights=weights, rank=0, world=2, merge=lambda t: (marks.append(t), t)[1])
        next(infobatch.epochs())
    assert len({mark[0].item() for mark in marks}) == 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(4), "one number for each of 5 samples, got shape"),
        (torch.ones(5, 1), "got shape"),
        ([1, 1, 0, 1, 1], "positive and finite, got 0 for sample 2"),
        ([1, 1, 1, 1, -2.5], "got -2.5 for sample 4"),
        ([float("nan"), 1, 1, 1, 1], "got nan for sample 0"),
        ([1, float("inf"), 1, 1, 1], "got inf for sample 1"),
        ("no weights", "must be numbers, one per sample, got str"),
    ],
)
def test_unusable_weights_raise(weights, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfoBatch(5, epochs=1, weights=weights)
