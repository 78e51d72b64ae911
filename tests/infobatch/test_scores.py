"""Scores and their reliability (law 10 of docs/architecture.md)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pretrain import InfoBatch
from pretrain.core.rng import generator
from pretrain.infobatch import chunks, scores
from pretrain.infobatch import plan as plans
from pretrain.infobatch.epoch_losses import UNSEEN
from pretrain.infobatch.level_stats import BINS, LevelStats, bins_of, level_sums
from pretrain.infobatch.plan import Plan
from pretrain.infobatch.policies import POLICIES, SamplingRule, ScoreStats
from pretrain.infobatch.scores import ScoreStore, reliability_sums

SAMPLES: dict[str, Any] = {"policy": "importance", "over": "samples", "budget": 0.7}


def below_the_mean(score: Tensor, known: ScoreStats) -> SamplingRule:
    """The published rule on relative scores: not marked by `raw_losses`."""
    return POLICIES["infobatch"](score, known)


def simulated(noise: float, epochs: int = 12, size: int = 3000, **more) -> tuple[InfoBatch, Tensor, list[str]]:
    """Losses of samples with lasting differences, of standard deviation 0.3, and noise in every epoch.

    Returns the InfoBatch, the samples' true difficulty, and the warnings.
    """
    truth = 1 + 0.3 * torch.randn(size, generator=generator(1)).clamp(-3, 3)
    warnings: list[str] = []
    infobatch = InfoBatch(size, epochs=epochs, warn=warnings.append, **more)
    for epoch in infobatch.epochs():
        for index in DataLoader(range(size), 500, sampler=infobatch):
            draw = torch.randn(len(index), generator=generator(epoch, int(index[0])))
            infobatch((truth[index] + noise * draw).clamp(min=0.01), index)
    return infobatch, truth / truth.mean(), warnings


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("policy", [{"policy": "full"}, {"policy": "infobatch"}, SAMPLES])
def test_reliability_is_the_slope_of_the_truth(noise: float, policy: dict) -> None:
    """The slope of the truth on the scores, which only a simulation knows, also if few easy samples are used."""
    infobatch, truth, _ = simulated(noise, epochs=20, **policy)
    score = infobatch.score
    slope = (torch.cov(torch.stack([truth, score]))[0, 1] / score.var()).item()
    assert infobatch.reliability == pytest.approx(min(slope, 1), abs=0.12)


def test_without_signal_samples_are_drawn_uniformly_with_a_warning() -> None:
    size = 3000
    warnings: list[str] = []
    infobatch = InfoBatch(size, epochs=8, anneal=0.0, policy=below_the_mean, warn=warnings.append)
    for epoch in infobatch.epochs():
        if epoch >= 3:
            assert infobatch.ignores_scores and infobatch.reliability == pytest.approx(0, abs=0.1)
            assert len(infobatch.plan.weight.unique()) == 2  # pruned, or n / k, for every score
            assert 0.6 < infobatch.length / size < 0.9  # and as many as the policy chooses
        for index in DataLoader(range(size), 500, sampler=infobatch):
            infobatch(torch.rand(len(index), generator=generator(epoch, int(index[0]))) + 0.1, index)
    assert len(warnings) == 1 and "samples are drawn uniformly" in warnings[0] and "reliability 0.0" in warnings[0]


def test_with_signal_there_is_no_warning() -> None:
    infobatch, _, warnings = simulated(0.2, **SAMPLES)
    assert not warnings and not infobatch.ignores_scores and infobatch.reliability is not None
    assert InfoBatch(3, epochs=1).reliability is None


def test_the_published_method_uses_the_last_losses() -> None:
    """As published: also if the losses carry no signal, and without a warning."""
    size, warnings = 3000, []
    infobatch = InfoBatch(size, epochs=8, anneal=0.0, warn=warnings.append)
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
    assert not warnings and not infobatch.ignores_scores and infobatch.reliability == pytest.approx(0, abs=0.1)


# -- the score -------------------------------------------------------------------------------------


def test_scores_are_relative_to_the_mean_loss_at_their_level() -> None:
    """Losses that mostly depend on the level give scores that depend on the sample."""
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
def test_smoothing_is_the_weight_of_the_old_score(smoothing: float) -> None:
    infobatch = InfoBatch(5000, epochs=2, policy="full", smoothing=smoothing)
    losses = torch.rand(2, 5000, generator=generator(0)) + 0.5
    for epoch in infobatch.epochs():
        for index in DataLoader(range(5000), 500, sampler=infobatch):
            infobatch(losses[epoch, index], index)
    torch.testing.assert_close(
        infobatch.score, smoothing * losses[0] + (1 - smoothing) * losses[1], atol=0.06, rtol=0
    )  # their mean is 1


def test_scores_are_relative_to_the_mean_loss_at_their_time() -> None:
    """The network learns during the epoch: early losses are not comparable with late ones."""
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


def test_scores_have_the_same_spread_at_every_level() -> None:
    """Losses with twice the standard deviation count half as much."""
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


def test_where_levels_do_not_matter_scores_follow_the_losses() -> None:
    losses = torch.rand(512, generator=generator(0)) + 0.1
    infobatch = InfoBatch(512, epochs=1, policy="full")
    for _ in infobatch.epochs():
        for index in DataLoader(range(512), 64, sampler=infobatch):
            infobatch(losses[index], index)
    assert torch.corrcoef(torch.stack([infobatch.score, losses]))[0, 1] > 0.99


@pytest.mark.parametrize(("seed", "threads"), [(0, 1), (1, 2), (2, 3)])
def test_an_epoch_of_many_chunks_is_what_its_samples_are_one_by_one(seed: int, threads: int, monkeypatch) -> None:
    """Chunks, threads and the order of storage change nothing; fewer samples for the statistics change little."""
    draw = generator(seed)
    size = int(torch.randint(70_000, 120_000, (), generator=draw))
    score = torch.rand(size, generator=draw) + 0.5
    score[torch.rand(size, generator=draw) < 0.3] = torch.nan
    mean = torch.linspace(2.0, 0.5, BINS, dtype=torch.float64)
    rule = POLICIES["importance"](score, ScoreStats(mean / mean.mean(), 0.5), share=0.6)
    plan = Plan(rule, score, (seed, 3))
    order = plan.order[: int(0.9 * plan.length)]  # the loop ended early
    level, time = bins_of(plan.level_of(order)), torch.arange(len(order)) * BINS // plan.length
    loss = torch.full((size,), UNSEEN)
    loss[order] = (mean[level] * (1.2 - 0.01 * time)).float() * (torch.rand(len(order), generator=draw) + 0.2)
    weight = plan.weight_of(order, score[order]).double()

    levels = LevelStats()
    levels.update(level_sums(loss[order].double(), level, time, weight))
    new = levels.scores_of(loss[order].double(), level, time)
    expected = score.clone()
    expected[order] = torch.where(score[order].isnan(), new.float(), 0.7 * score[order] + 0.3 * new.float())

    def updated() -> ScoreStore:
        store = ScoreStore(size, 0.7)
        store.score.copy_(score)
        assert store.mean(loss, plan) == pytest.approx((weight @ loss[order].double() / weight.sum()).item())
        store.update(loss, plan)
        return store

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for module in (chunks, scores, plans):
        monkeypatch.setattr(module, "CHUNK", 1 << 15)
    store = updated()
    torch.testing.assert_close(store.score, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(store.levels.sums, levels.sums)
    sums = reliability_sums(score[order].double(), new, weight)
    torch.testing.assert_close(store.reliability.sums, sums, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(scores, "STATISTICS", size // 3)
    torch.testing.assert_close(updated().score, expected, rtol=0.1, atol=0.1, equal_nan=True)
    assert (updated().levels.mean / levels.mean - 1).abs().max() < 0.1
