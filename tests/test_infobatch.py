"""The laws of InfoBatch (docs/design.md), over random inputs."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from pretrain import InfoBatch
from pretrain.rng import generator


def run(infobatch: InfoBatch, losses: Tensor, batch_size: int = 7) -> Iterator[tuple[int, Tensor]]:
    """Train on fixed losses; yields (epoch, indices) of each step before it is scored."""
    for epoch in infobatch.epochs():
        # A generator of its own: a loader draws from the global one as soon as it is iterated.
        for index in DataLoader(range(infobatch.size), batch_size, sampler=infobatch, generator=torch.Generator()):
            yield epoch, index
            infobatch(losses[index], index)


# -- law 1: unbiased; the rest of it is in tests/test_policies.py ----------------------------------


def test_the_loss_is_divided_by_the_number_of_samples_never_by_the_weights() -> None:
    infobatch = InfoBatch(10, epochs=8)
    losses = torch.linspace(0.1, 1, 10)
    for _ in infobatch.epochs():
        for index in DataLoader(range(10), 4, sampler=infobatch):
            weighted = (losses[index] * infobatch.plan.weight[index]).sum() / len(index)
            assert infobatch(losses[index], index).item() == pytest.approx(weighted.item())


# -- law 2: nobody starves -------------------------------------------------------------------------


@given(st.integers(1, 40), st.floats(0, 1))
@settings(deadline=None)
def test_once_annealing_begins_everybody_counts_once(epochs: int, anneal: float) -> None:
    infobatch = InfoBatch(20, epochs=epochs, anneal=anneal)
    losses = torch.rand(20, generator=generator(epochs)) + 0.1
    pruned = []
    for epoch in infobatch.epochs():
        if infobatch.length == 20:
            assert infobatch.plan.weight.eq(1).all()
        else:
            pruned.append(epoch)
        for index in DataLoader(range(20), 6, sampler=infobatch):
            infobatch(losses[index], index)
    full = epochs - len(pruned) - 1  # the first epoch has no scores to prune by
    assert pruned == list(range(1, len(pruned) + 1))
    assert anneal * epochs - 1e-6 <= full + (not pruned) and full <= anneal * epochs + 1
    assert infobatch.progress == 1


# -- law 3: the index is right ---------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, 0.1 + (~index if index < 0 else index)


@pytest.mark.parametrize(
    "workers", [{}, {"num_workers": 1}, {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}]
)
@pytest.mark.parametrize("drop_last", [False, True])
def test_scores_go_to_their_samples_under_workers_and_prefetch(workers: dict, drop_last: bool) -> None:
    infobatch = InfoBatch(37, epochs=4, smoothing=0.0, seed=1)
    loader = DataLoader(Numbers(), 5, sampler=infobatch, drop_last=drop_last, **workers)
    for _ in infobatch.epochs():
        for index, value in loader:
            infobatch(value, index)
    order = infobatch.score.nan_to_num(nan=-1).argsort()
    known = order[~infobatch.score[order].isnan()]
    assert known.tolist() == sorted(known.tolist()) and len(known) >= 37 - 2


# -- law 4: iterating is pure ----------------------------------------------------------------------


def test_iterating_twice_gives_the_same_and_touches_nothing() -> None:
    infobatch = InfoBatch(30, epochs=6)
    before = torch.get_rng_state()
    losses = torch.rand(30, generator=generator(1)) + 0.1
    kept = losses.clone()
    for _, index in run(infobatch, losses):
        assert list(infobatch) == list(infobatch) == infobatch.plan.order[infobatch.seen :].tolist()
        assert index.tolist() == list(infobatch)[: len(index)]
    assert torch.equal(losses, kept)
    assert torch.equal(before, torch.get_rng_state())


# -- law 5: position is what was scored ------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_stopped_anywhere_the_rest_is_the_same(stop: int, seed: int) -> None:
    losses = torch.rand(31, generator=generator(seed)) + 0.1

    def fresh() -> InfoBatch:
        return InfoBatch(31, epochs=9, seed=seed)

    whole = fresh()
    steps = []
    for step, (epoch, index) in enumerate(run(whole, losses)):
        steps.append((epoch, index.tolist()))
        if step == stop:
            state = whole.state_dict()
    if stop >= len(steps):
        return
    resumed = fresh()
    resumed.load_state_dict(state)
    assert [(epoch, index.tolist()) for epoch, index in run(resumed, losses)] == steps[stop:]
    assert torch.equal(resumed.score, whole.score) and resumed.visited == whole.visited


# -- law 6: n processes are one --------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(1, 40), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_ranks_together_visit_what_one_would(world: int, size: int, share: int) -> None:
    """Step by step the same samples, the same scores, the same sum of losses; whatever the remainder is."""
    losses = torch.rand(size, generator=generator(size)) + 0.1
    tables: list[Tensor] = []

    def merge(table: Tensor) -> Tensor:  # stands for an all-reduce: called rank after rank, see below
        tables.append(table)
        return table

    alone = InfoBatch(size, epochs=4)
    ranks = [InfoBatch(size, epochs=4, rank=rank, world=world, merge=merge) for rank in range(world)]
    for _, *_ in zip(alone.epochs(), *(rank.epochs() for rank in ranks), strict=True):
        assert all(torch.equal(rank.plan.order, alone.plan.order) for rank in ranks)
        dealt = [list(rank) for rank in ranks]
        assert len({len(part) for part in dealt}) == 1
        for start in range(0, len(dealt[0]), share):
            parts = [torch.tensor(part[start : start + share]) for part in dealt]
            together = torch.cat(parts)
            counted = together[together >= 0]
            step = alone.plan.order[alone.seen : alone.seen + share * world]
            assert sorted(counted.tolist()) == sorted(step.tolist())
            values = [rank(losses[part], part) for rank, part in zip(ranks, parts, strict=True)]
            expected = alone(losses[step], step)
            assert sum(values).item() / world == pytest.approx(expected.item(), rel=1e-5)
            assert {rank.seen for rank in ranks} == {alone.seen}
        merged = torch.stack([rank._ledger.loss for rank in ranks]).amax(0)
        for rank in ranks:
            rank._ledger.loss = merged.clone()
    assert all(torch.equal(rank.score.nan_to_num(), alone.score.nan_to_num()) for rank in ranks)


# -- law 8: bad numbers stop -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_is_named_and_never_a_score(bad: float) -> None:
    infobatch = InfoBatch(20, epochs=3)
    losses = torch.ones(20)
    losses[13] = bad
    with pytest.raises(FloatingPointError, match="sample 13 is not finite"):
        for _ in run(infobatch, losses):
            infobatch.check()
    with pytest.raises(FloatingPointError, match="sample 13"):  # also for those who never ask
        list(run(InfoBatch(20, epochs=3), losses))


def test_misuse_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="epochs"):
        iter(InfoBatch(3, epochs=1))
    infobatch = InfoBatch(3, epochs=2)
    next(infobatch.epochs())
    with pytest.raises(ValueError, match="reduction='none'"):
        infobatch(torch.tensor(1.0), torch.arange(3))
    with pytest.raises(ValueError, match="all of them have been scored"):
        for _ in range(2):
            infobatch(torch.ones(3), torch.arange(3))
    for wrong in (
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"anneal": 2},
        {"smoothing": 1},
        {"rank": 1},
        {"policy": "infobach"},
    ):
        with pytest.raises(ValueError, match=r"ratio|anneal|smoothing|rank|infobach"):
            InfoBatch(3, epochs=1, **wrong)
    with pytest.raises(ValueError, match="state is of 3 samples"):
        InfoBatch(4, epochs=2).load_state_dict(infobatch.state_dict())
    with pytest.raises(ValueError, match="negative"):
        list(run(InfoBatch(3, epochs=2), -torch.ones(3)))


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


def test_where_levels_do_not_matter_they_do_nothing() -> None:
    losses = torch.rand(512, generator=generator(0)) + 0.1
    infobatch = InfoBatch(512, epochs=1)
    list(run(infobatch, losses))
    assert torch.corrcoef(torch.stack([infobatch.score, losses]))[0, 1] > 0.99
