"""The laws of InfoBatch (docs/architecture.md), over random inputs."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from pretrain import Indexed, InfoBatch
from pretrain.core.rng import generator


def run(infobatch: InfoBatch, losses: Tensor, batch_size: int = 7) -> Iterator[tuple[int, Tensor]]:
    """Train on fixed losses; yields (epoch, indices) of each step before it is scored."""
    for epoch in infobatch.epochs():
        # A generator of its own: a loader draws from the global one as soon as it is iterated.
        for index in DataLoader(range(infobatch.size), batch_size, sampler=infobatch, generator=torch.Generator()):
            yield epoch, index
            infobatch(losses[index], index)


# -- law 1: unbiased; the rest of it is in tests/infobatch/test_policies.py ----------------------------------


def test_the_loss_is_divided_by_the_number_of_samples_not_by_the_weights() -> None:
    infobatch = InfoBatch(10, epochs=8)
    losses = torch.linspace(0.1, 1, 10)
    for _ in infobatch.epochs():
        for index in DataLoader(range(10), 4, sampler=infobatch):
            weighted = (losses[index] * infobatch.plan.weight[index]).sum() / len(index)
            assert infobatch(losses[index], index).item() == pytest.approx(weighted.item())


def test_a_second_loss_has_the_weights_of_the_first() -> None:
    """In every batch, the last ones too; asked after the losses are passed, the weights would be wrong and raise."""
    infobatch = InfoBatch(23, epochs=6, policy="quantile", anneal=0)
    losses = torch.rand(23, generator=generator(1)) + 0.1
    for _ in infobatch.epochs():
        for index in DataLoader(range(23), 5, sampler=infobatch):
            second = (infobatch.weight(index) * losses[index]).mean()
            assert second.item() == pytest.approx(infobatch(losses[index], index).item())
            with pytest.raises(ValueError, match="before the losses of these samples are passed"):
                infobatch.weight(index)
            assert (infobatch.weight(~index) == 0).all()  # padding, whose samples may have their losses


# -- law 2: every sample has a chance -------------------------------------------------------------------------


@given(st.integers(1, 40), st.floats(0, 1))
@settings(deadline=None, max_examples=15)
def test_annealing_uses_every_sample_with_weight_one(epochs: int, anneal: float) -> None:
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


def test_annealing_uses_every_sample_and_still_chooses_levels() -> None:
    infobatch = InfoBatch(400, epochs=6, policy="importance", budget=0.8, anneal=0.34, warn=lambda sentence: None)
    for epoch in infobatch.epochs():
        every_sample = torch.arange(400)
        annealing = epoch >= infobatch.first_full
        assert (infobatch.length == 400) == (annealing or epoch == 0)
        mean = infobatch.level(every_sample).mean().item()
        assert mean == pytest.approx(0.5, abs=0.01) if epoch == 0 else mean < 0.45
        if annealing:  # a weight is one over the density of the level, so the mean over levels stays what it is
            assert (infobatch.plan.weight * infobatch.level(every_sample)).mean().item() == pytest.approx(0.5, abs=0.01)
        for index in DataLoader(range(400), 16, sampler=infobatch):
            infobatch(0.05 + (1 - infobatch.level(index)) ** 2, index)


@given(
    st.sampled_from(["random", "importance"]),
    st.integers(30, 120),
    st.integers(4, 20),
    st.floats(0.5, 1),
    st.floats(0, 0.3),
)
@settings(deadline=None, max_examples=20)
def test_a_budget_is_met_exactly(policy: str, size: int, epochs: int, budget: float, anneal: float) -> None:
    """Over the whole run, the first epoch and those that anneal included."""
    losses = torch.rand(size, generator=generator(size)) + 0.1
    try:
        infobatch = InfoBatch(size, epochs=epochs, policy=policy, budget=budget, anneal=anneal)
    except ValueError as error:
        assert "every sample is used" in str(error)
        return
    rooms = []
    for _ in infobatch.epochs():
        rooms.append(infobatch.length)
        for index in DataLoader(range(size), 16, sampler=infobatch):
            infobatch(losses[index], index)
    least = min(rooms)
    assert (
        infobatch.samples_used == round(budget * size * epochs) or least <= 0.25 * size
    )  # the minimum share requires more
    assert infobatch.dropped == 0


def test_dropped_samples_are_counted_and_compensated() -> None:
    infobatch = InfoBatch(100, epochs=10, policy="random", budget=0.7, anneal=0.0)
    losses = torch.rand(100, generator=generator(0)) + 0.1
    planned = 0
    for _ in infobatch.epochs():
        planned += infobatch.length
        for index in DataLoader(range(100), 16, sampler=infobatch, drop_last=True):
            infobatch(losses[index], index)
    assert infobatch.dropped > 0 and infobatch.samples_used + infobatch.dropped == planned
    assert abs(infobatch.samples_used - 700) < 16


# -- law 3: the index is right ---------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> float:
        return 0.1 + index


@pytest.mark.parametrize(
    "workers",
    [
        {},
        {"num_workers": 1, "prefetch_factor": 1},
        {"num_workers": 4, "prefetch_factor": 8},
        {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4},
        {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than some machines have cores
def test_scores_belong_to_their_samples_with_workers_and_prefetching(workers: dict, drop_last: bool) -> None:
    infobatch = InfoBatch(37, epochs=4, smoothing=0.0, seed=1)
    loader = DataLoader(Indexed(Numbers()), 5, sampler=infobatch, drop_last=drop_last, **workers)
    for _ in infobatch.epochs():
        for index, value in loader:
            assert torch.equal(value, 0.1 + index.double())
            infobatch(value, index)
    order = infobatch.score.nan_to_num(nan=-1).argsort()
    known = order[~infobatch.score[order].isnan()]
    assert known.tolist() == sorted(known.tolist()) and len(known) >= 37 - 2
    assert infobatch.samples_used < 4 * 37 - infobatch.dropped


def test_indexed_returns_the_sample_of_padding() -> None:
    assert Indexed([(3, 4), (5, 6)])[~1] == (~1, 5, 6) and Indexed(["a", "b"])[0] == (0, "a")


# -- law 4: iterating is pure ----------------------------------------------------------------------


def test_iterating_twice_gives_the_same_and_changes_nothing() -> None:
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
def test_resumed_anywhere_the_rest_is_the_same(stop: int, seed: int) -> None:
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
    assert torch.equal(resumed.score, whole.score) and resumed.samples_used == whole.samples_used


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"prune_ratio": 0.4},
        {"policy": "full"},
        {"epochs": 3},
        {"policy": "importance", "over": "samples", "budget": 0.7},
    ],
    ids=str,
)
def test_inside_an_epoch_another_plan_raises(other: dict) -> None:
    settings = {"epochs": 9, "policy": "infobatch", "seed": 0}
    infobatch = InfoBatch(60, **settings)
    losses = torch.rand(60, generator=generator(1)) + 0.1
    for epoch, _ in run(infobatch, losses):
        if epoch == 2 and infobatch.seen:
            break
    with pytest.raises(ValueError, match="whose plan would be another one now"):
        InfoBatch(60, **settings | other).load_state_dict(infobatch.state_dict())
    InfoBatch(60, **settings).load_state_dict(infobatch.state_dict())


# -- law 6: n processes are one --------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(1, 40), st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_ranks_together_use_the_samples_of_one_process(world: int, size: int, share: int) -> None:
    """Step by step the same samples, the same scores, the same sum of losses; for any remainder."""
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
        merged = torch.stack([rank.losses.loss for rank in ranks]).amax(0)
        for rank in ranks:
            rank.losses.loss = merged.clone()
    assert all(torch.equal(rank.score.nan_to_num(), alone.score.nan_to_num()) for rank in ranks)


# -- law 7: no sync in a step ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", [{"policy": "infobatch"}, {"policy": "importance", "budget": 0.8}])
def test_a_step_does_not_synchronize_with_the_device(policy: dict) -> None:
    """On the meta device, where reading a value raises."""
    infobatch = InfoBatch(64, epochs=9, **policy)
    losses = torch.rand(64, generator=generator(0)) + 0.1
    for epoch in infobatch.epochs():
        for index in DataLoader(range(64), 8, sampler=infobatch, generator=torch.Generator()):
            if epoch == 2:
                meta = index.to("meta")
                assert infobatch(losses[index].to("meta").requires_grad_(), meta).device.type == "meta"
                assert infobatch.level(meta).device.type == "meta"
            else:
                infobatch(losses[index], index)
        if epoch == 2:
            break
    assert infobatch.seen == infobatch.length


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_step_does_not_synchronize_with_a_gpu() -> None:
    infobatch = InfoBatch(64, epochs=4)
    for epoch in infobatch.epochs():
        for number, index in enumerate(DataLoader(range(64), 8, sampler=infobatch, generator=torch.Generator())):
            loss, index = torch.rand(len(index), device="cuda", requires_grad=True), index.cuda()
            torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first step copies the plan's tables
            infobatch(loss, index).backward()
            torch.cuda.set_sync_debug_mode("default")
        assert infobatch.seen == infobatch.length and epoch < 4


# -- law 9: scale; the rest of it is in benchmarks/planning.py -------------------------------------


@pytest.mark.parametrize("policy", [{"policy": "full"}, {}, {"policy": "importance", "budget": 0.6}])
def test_at_most_twelve_bytes_per_sample(policy: dict) -> None:
    size = 200_000
    infobatch = InfoBatch(size, epochs=9, **policy)
    losses = torch.rand(size, generator=generator(0)) + 0.1
    for epoch in infobatch.epochs():
        for index in DataLoader(range(size), 50_000, sampler=infobatch):
            infobatch(losses[index], index)
        found, known = 0, set()
        todo: list[object] = [infobatch]
        while todo:  # everything the object refers to
            item = todo.pop()
            if id(item) in known or isinstance(item, type | str):
                continue
            known.add(id(item))
            if isinstance(item, torch.Tensor):
                found += item.untyped_storage().nbytes()
            elif isinstance(item, np.ndarray):
                found += item.nbytes
            elif isinstance(item, dict | list | tuple):
                todo += item.values() if isinstance(item, dict) else item
            elif hasattr(item, "__dict__") and type(item).__module__.startswith("pretrain"):
                todo += vars(item).values()
        assert 8 * size <= found <= 12 * size + 20_000
        if epoch == 1:
            break
    inside = sum(value.nbytes for value in infobatch.state_dict().values() if isinstance(value, Tensor))
    list(zip(range(1), infobatch.epochs(), strict=False))
    assert inside <= 8 * size + 2000
