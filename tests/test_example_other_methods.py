"""OrderDP, SeTa, IES and Selective-Backprop: what each uses in an epoch, by its own rule, and that all train."""

import itertools
import math
import sys
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

sys.path.insert(0, str(ROOT / "examples"))  # as for a script that is started there

import fit
import other_methods
from fit import Training
from other_methods import METHODS

from pretrain.adapters import Batch, Losses
from pretrain.core.rng import SampleRNG, generator


def simulated(name: str, seed: int = 0, size: int = 97, epochs: int = 9, **more: Any) -> tuple[list[Tensor], Any]:
    """The indices of each epoch, of a training whose losses are random, and the method."""
    found: list[Tensor] = []
    method = METHODS[name](size, epochs=epochs, seed=seed, **more)
    for epoch in method.epochs():
        rng, place, used = SampleRNG(seed, epoch, index=torch.arange(size)), 0, []
        loss = (2 * rng.normal() - 0.3 * epoch).exp()
        order = torch.tensor([*method])
        assert len(method) == len(order) and [*method] == order.tolist()
        for index in order.split(16):
            own = loss[index].clone().requires_grad_()
            before = method.forward_only
            mean = method(own, index, own.detach())
            mean.backward()
            count = len(index) - (method.forward_only - before)
            assert own.grad is not None and int((own.grad > 0).sum()) == count
            assert own.grad.sum() == pytest.approx(min(count, 1)) and len({*own.grad[own.grad > 0].tolist()}) <= 1
            used.append(index[own.grad > 0])
            place += len(index)
            assert method.progress == pytest.approx((epoch + place / len(order)) / epochs)
        assert torch.equal(method.last[order], loss[order]) and len(order.unique()) == len(order)
        assert method.mean() == pytest.approx(loss[order].mean().item(), rel=1e-5)
        found.append(torch.cat(used))
    assert method.progress == 1
    return found, method


BUDGETS: dict[str, dict[str, Any]] = {name: {"budget": 0.6} if METHODS[name].budgeted else {} for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_uses_what_it_selects_and_is_a_function_of_the_seed(name: str) -> None:
    (one, first), (two, second), (other, _) = (simulated(name, seed, **BUDGETS[name]) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and first.samples_used == second.samples_used
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert first.samples_used - first.forward_only == sum(map(len, one))


def test_padding_counts_for_nothing() -> None:
    method = METHODS["ies"](4, epochs=1)
    for _ in method.epochs():
        loss = torch.tensor([1.0, 3.0, 100.0], requires_grad=True)
        assert method(loss, torch.tensor([0, 1, ~2])).item() == 2.0
        assert method.last.tolist() == [1, 3, 3, 3] and method.forward_only == 0


def test_orderdp_uses_each_rank_as_often_as_it_says() -> None:
    """Over seeds, at given last losses; and as many samples as the budget in every epoch."""
    n, epochs, trials = 12, 1, 3000
    method = METHODS["orderdp"](n, epochs=epochs, budget=0.5, top=0.6)
    assert isinstance(method, other_methods.OrderDP)
    s, q = method.pool, method.used
    assert (s, q) == (10, 6)
    method.last = torch.arange(n).float()  # the last sample is of rank 1
    count = torch.zeros(n)
    for seed in range(trials):
        method.seed = seed
        count[method.select()] += 1
    rank = [
        sum(comb(j - 1, l - 1) * comb(n - j, s - l) for l in range(1, q + 1)) / comb(n, s)  # noqa: E741
        for j in range(1, n + 1)
    ]
    assert sum(rank) == pytest.approx(q)
    error = 4 * math.sqrt(0.25 / trials)
    assert (count.flip(0) / trials - torch.tensor(rank)).abs().max() < error
    used, made = simulated("orderdp", size=200, budget=0.7)
    assert [len(each) for each in used] == [140] * 9 and made.samples_used == 9 * 140


def test_the_window_of_seta_slides_over_groups_from_easy_to_hard() -> None:
    size, epochs = 500, 16
    method = METHODS["seta"](size, epochs=epochs, keep=0.8, groups=5, window=0.4)
    assert isinstance(method, other_methods.SeTa)
    method.last = torch.randn(size, generator=generator(3)).exp()
    for epoch in range(epochs):
        method.epoch = epoch
        found = method.select()
        assert len(found.unique()) == len(found) <= 400
        if epoch in (0, 14, 15):
            assert len(found) == 400
            continue
        drawn = torch.randperm(size, generator=method.draws(1))[:400]
        group = other_methods.intervals(method.last[drawn], 5)
        ends = [(method.last[drawn][group == g].min(), method.last[drawn][group == g].max()) for g in range(5)]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))
        inside = (method.last >= ends[epoch % 4][0]) & (method.last <= ends[epoch % 4 + 1][1])
        assert sorted(found.tolist()) == sorted(i for i in drawn.tolist() if inside[i])


@given(st.lists(st.floats(0, 50, width=32), min_size=6, max_size=60), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_groups_are_a_fixed_point_of_k_means(values: list[float], groups: int) -> None:
    value = torch.tensor(values)
    group = other_methods.intervals(value, groups)
    assert (group[value.argsort()].diff() >= 0).all()
    means = {int(g): value[group == g].double().mean() for g in group.unique()}
    for x, g in zip(value.double(), group.tolist(), strict=True):
        assert (x - means[g]).abs() <= min((x - mean).abs() for mean in means.values()) + 1e-6


def test_ies_excludes_samples_whose_second_differences_are_small() -> None:
    size, epochs, window, threshold = 40, 14, 2, 0.3
    method = METHODS["ies"](size, epochs=epochs, threshold=threshold, window=window)
    steps = torch.rand(size, generator=generator(1)) * 0.8
    history: list[Tensor] = []
    excluded = 0
    for epoch in method.epochs():
        expected = torch.zeros(size, dtype=torch.bool)
        if len(history) >= window + 3:
            change = [history[-k] - 2 * history[-k - 1] + history[-k - 2] for k in range(1, window + 2)]
            expected = torch.stack(change[:window]).abs().mean(dim=0) < threshold
        loss = 5 - 0.2 * epoch + steps * torch.randn(size, generator=generator(2, epoch))
        before = method.forward_only
        own = loss.clone().requires_grad_()
        method(own, torch.arange(size)).backward()
        assert own.grad is not None and torch.equal(own.grad == 0, expected)
        assert method.forward_only - before == expected.sum()
        excluded += int(expected.sum())
        history.append(loss)
    assert 0 < excluded < size * epochs / 2


def test_selective_backprop_prefers_large_losses_and_keeps_to_its_budget() -> None:
    size, budget = 4000, 0.25
    method = METHODS["selective-backprop"](size, epochs=1, budget=budget, recent=2000)
    count, large = torch.zeros(4), torch.zeros(4)
    for _ in method.epochs():
        for index in torch.arange(size).split(50):
            loss = torch.rand(len(index), generator=generator(4, int(index[0]))).requires_grad_()
            method(loss, index).backward()
            quarter = (4 * loss.detach()).long()
            count += torch.bincount(quarter, minlength=4)
            large += torch.bincount(quarter[loss.grad > 0], minlength=4)  # type: ignore[operator]
    assert 1 - method.forward_only / size == pytest.approx(budget, abs=0.03)
    edges = torch.arange(5) / 4  # the mean of u ** 3 over each quarter
    assert (large / count - (edges**4).diff()).abs().max() < 0.05


def test_methods_train(tmp_path: Path) -> None:
    """The loop of the examples takes each; a loss that is not used has no gradient."""

    def losses(model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        return Losses(model(batch.image).squeeze(1).square())

    x = torch.randn(64, 3)

    def batches(method: Any) -> Any:
        for index in torch.tensor([*method]).split(16):
            yield Batch(x[index], index, index, torch.zeros(len(index)))

    for name in METHODS:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        before = losses(model, Batch(x, *[torch.arange(64)] * 3), None).loss.mean()  # type: ignore[arg-type]
        fit.fit(Training(epochs=8, lr=0.05, policy=name, **BUDGETS[name]), model, losses, 64, batches)
        assert losses(model, Batch(x, *[torch.arange(64)] * 3), None).loss.mean() < 0.2 * before  # type: ignore[arg-type]
