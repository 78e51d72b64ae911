"""What is remembered of the samples: scores, and how reliable they are (law 10 of docs/architecture.md)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pretrain import InfoBatch
from pretrain.core.rng import generator
from pretrain.infobatch.policies import POLICIES, SamplingRule, ScoreStats

SAMPLES: dict[str, Any] = {"policy": "importance", "over": "samples", "budget": 0.7}


def below_the_mean(score: Tensor, known: ScoreStats) -> SamplingRule:
    """The published rule, but on scores that are compared with what is usual: not marked by `raw_losses`."""
    return POLICIES["infobatch"](score, known)


def simulated(noise: float, epochs: int = 12, size: int = 3000, **more) -> tuple[InfoBatch, Tensor, list[str]]:
    """Losses of samples with lasting differences, spread 0.3, and noise of every visit beside them.

    Returns the InfoBatch, the samples' true difficulty, and what the user was told.
    """
    truth = 1 + 0.3 * torch.randn(size, generator=generator(1)).clamp(-3, 3)
    told: list[str] = []
    infobatch = InfoBatch(size, epochs=epochs, warn=told.append, **more)
    for epoch in infobatch.epochs():
        for index in DataLoader(range(size), 500, sampler=infobatch):
            draw = torch.randn(len(index), generator=generator(epoch, int(index[0])))
            infobatch((truth[index] + noise * draw).clamp(min=0.01), index)
    return infobatch, truth / truth.mean(), told


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("policy", [{"policy": "full"}, {"policy": "infobatch"}, SAMPLES])
def test_reliability_is_what_it_is(noise: float, policy: dict) -> None:
    """The slope of the truth on the scores, which only a simulation knows, also where few of the easy are visited."""
    infobatch, truth, _ = simulated(noise, epochs=20, **policy)
    score = infobatch.score
    slope = (torch.cov(torch.stack([truth, score]))[0, 1] / score.var()).item()
    assert infobatch.reliability == pytest.approx(min(slope, 1), abs=0.12)


def test_where_scores_carry_nothing_the_choice_is_uniform_and_the_user_is_told() -> None:
    size = 3000
    told: list[str] = []
    infobatch = InfoBatch(size, epochs=8, anneal=0.0, policy=below_the_mean, warn=told.append)
    for epoch in infobatch.epochs():
        if epoch >= 3:
            assert infobatch.ignores_scores and infobatch.reliability == pytest.approx(0, abs=0.1)
            assert len(infobatch.plan.weight.unique()) == 2  # pruned, or n / k, whatever the score
            assert 0.6 < infobatch.length / size < 0.9  # and as many as the policy would
        for index in DataLoader(range(size), 500, sampler=infobatch):
            infobatch(torch.rand(len(index), generator=generator(epoch, int(index[0]))) + 0.1, index)
    assert len(told) == 1 and "samples are drawn uniformly" in told[0] and "reliability 0.0" in told[0]


def test_where_they_carry_something_nobody_is_told_anything() -> None:
    infobatch, _, told = simulated(0.2, **SAMPLES)
    assert not told and not infobatch.ignores_scores and infobatch.reliability is not None
    assert InfoBatch(3, epochs=1).reliability is None


def test_the_published_method_goes_by_the_last_losses_whatever_they_tell() -> None:
    """As published: also where the choice is no better than chance, and nobody is told."""
    size, told = 3000, []
    infobatch = InfoBatch(size, epochs=8, anneal=0.0, warn=told.append)
    last = torch.full((size,), math.nan)
    for epoch in infobatch.epochs():
        if epoch:
            assert torch.equal(infobatch.score, last)
            easy = last < last.mean()
            assert infobatch.plan.weight[~easy].eq(1).all()
            assert infobatch.plan.weight[easy].eq(0).float().mean().item() == pytest.approx(0.5, abs=0.01)
        for index in DataLoader(range(size), 500, sampler=infobatch):
            last[index] = 5 * torch.rand(len(index), generator=generator(epoch, int(index[0]))) + infobatch.level(index)
            infobatch(last[index], index)
    assert not told and not infobatch.ignores_scores and infobatch.reliability == pytest.approx(0, abs=0.1)


# -- the score -------------------------------------------------------------------------------------


def test_losses_are_compared_with_what_is_usual_at_their_level() -> None:
    """A raw loss that mostly tells its level gives scores that tell the samples apart all the same."""
    difficulty = torch.rand(2000, generator=generator(0)) + 0.5
    infobatch = InfoBatch(2000, epochs=6, policy="full")
    raw = torch.empty(2000)
    for _ in infobatch.epochs():
        for index in DataLoader(range(2000), 100, sampler=infobatch):
            level = infobatch.level(index)
            raw[index] = difficulty[index] * torch.exp(-5 * level)
            infobatch(raw[index], index)

    def correlation(value: Tensor) -> float:
        return torch.corrcoef(torch.stack([value, difficulty]))[0, 1].item()

    assert correlation(raw) < 0.4
    assert correlation(infobatch.score) > 0.95


@pytest.mark.parametrize("smoothing", [0.0, 0.7, 0.9])
def test_a_score_keeps_the_stated_share_of_its_past(smoothing: float) -> None:
    infobatch = InfoBatch(5000, epochs=2, policy="full", smoothing=smoothing)
    losses = torch.rand(2, 5000, generator=generator(0)) + 0.5
    for epoch in infobatch.epochs():
        for index in DataLoader(range(5000), 500, sampler=infobatch):
            infobatch(losses[epoch, index], index)
    torch.testing.assert_close(
        infobatch.score, smoothing * losses[0] + (1 - smoothing) * losses[1], atol=0.06, rtol=0
    )  # their mean is 1


def test_losses_are_compared_with_what_is_usual_at_their_time() -> None:
    """The network learns while the epoch runs: an early visit's loss is no measure for a late one's."""
    difficulty = torch.rand(4000, generator=generator(0)) + 0.5
    infobatch = InfoBatch(4000, epochs=1, policy="full")
    raw = torch.empty(4000)
    for _ in infobatch.epochs():
        for step, index in enumerate(DataLoader(range(4000), 40, sampler=infobatch)):
            raw[index] = difficulty[index] * (0.2 + 2 * math.exp(-step / 20))
            infobatch(raw[index], index)
    with_raw, with_score = (
        torch.corrcoef(torch.stack([value, difficulty]))[0, 1].item() for value in (raw, infobatch.score)
    )
    assert with_raw < 0.45 and with_score > 0.97


def test_scores_are_equally_far_spread_at_every_level() -> None:
    """Where losses spread twice as far, they count half as much."""
    noise = torch.randn(20_000, generator=generator(0)).clamp(-3, 3)
    infobatch = InfoBatch(20_000, epochs=1, policy="full")
    for _ in infobatch.epochs():
        for index in DataLoader(range(20_000), 500, sampler=infobatch):
            level = infobatch.level(index)
            infobatch((0.2 + level) * (1 + (0.02 + 0.2 * level) * noise[index]), index)
        levels = infobatch.plan.level
    low, high = infobatch.score[levels < 0.2].std(), infobatch.score[levels > 0.8].std()
    assert 0.9 < (low / high).item() < 1.1
    assert torch.corrcoef(torch.stack([infobatch.score, noise]))[0, 1] > 0.93


def test_where_levels_do_not_matter_they_do_nothing() -> None:
    losses = torch.rand(512, generator=generator(0)) + 0.1
    infobatch = InfoBatch(512, epochs=1, policy="full")
    for _ in infobatch.epochs():
        for index in DataLoader(range(512), 64, sampler=infobatch):
            infobatch(losses[index], index)
    assert torch.corrcoef(torch.stack([infobatch.score, losses]))[0, 1] > 0.99
