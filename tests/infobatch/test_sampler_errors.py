"""InfoBatch: wrong losses, indices, settings and data sets raise errors."""

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from pretrain import Indexed, InfoBatch
from pretrain.core.rng import generator
from pretrain.distributed import collectives

SAMPLES: dict[str, Any] = {"policy": "importance", "over": "samples"}


def run(infobatch: InfoBatch, losses: Tensor, batch_size: int = 7) -> Iterator[tuple[int, Tensor]]:
    """Train on fixed losses; yields (epoch, indices) of each step before it is scored."""
    for epoch in infobatch.epochs():
        # A generator of its own: a loader draws from the global one as soon as it is iterated.
        for index in DataLoader(range(infobatch.size), batch_size, sampler=infobatch, generator=torch.Generator()):
            yield epoch, index
            infobatch(losses[index], index)


@pytest.mark.parametrize(
    "bad",
    [
        math.nan,
        math.inf,
        -math.inf,
    ],
)
def test_a_non_finite_loss_raises_and_is_never_a_score(bad: float) -> None:
    infobatch = InfoBatch(20, epochs=3)
    losses = torch.ones(20)
    losses[13] = bad
    with pytest.raises(FloatingPointError, match="sample 13 is not finite"):
        for _ in run(infobatch, losses):
            infobatch.check()
    with pytest.raises(FloatingPointError, match="sample 13"):  # also without a call of check
        list(run(InfoBatch(20, epochs=3), losses))


@pytest.mark.parametrize("fault", ["not finite", "negative", "twice"])
def test_after_an_error_a_good_state_continues(fault: str) -> None:
    infobatch = InfoBatch(20, epochs=3)
    good = infobatch.state_dict()
    losses, index = torch.ones(20), torch.arange(20)
    with pytest.raises((FloatingPointError, ValueError)):
        for _, used in run(infobatch, losses.index_fill(0, index[13:14], math.nan if fault == "not finite" else 1.0)):
            if fault == "negative":
                infobatch(-losses[used], used)
            if fault == "twice":
                infobatch(losses[used], used)
            infobatch.check()
    infobatch.load_state_dict(good)
    for _ in run(infobatch, losses):
        infobatch.check()
    assert infobatch.epoch == 3 and (infobatch.score == 1).all()


def step_once(infobatch: InfoBatch) -> list[int]:
    """Begin the first epoch."""
    next(infobatch.epochs())
    return list(infobatch)


def test_a_loss_of_the_wrong_shape_raises() -> None:
    infobatch = InfoBatch(4, epochs=2)
    order = torch.tensor(step_once(infobatch))
    weight = torch.ones(4, requires_grad=True)
    for wrong in (weight.mean(), torch.tensor(1.0), weight.mean().view(1), weight.view(2, 2), weight[:3]):
        with pytest.raises(ValueError, match="reduction='none'"):
            infobatch(wrong, order)
    nothing: Any = (
        None,
        0.5,
        [1.0] * 4,
        torch.ones(4).numpy(),
        *(torch.ones(4).to(t) for t in (torch.int64, torch.bool)),
    )
    for wrong in nothing:
        with pytest.raises(ValueError, match="losses must be a floating-point tensor, one per sample, got"):
            infobatch(wrong, order)
    with pytest.raises(ValueError, match=r"got scores of shape \(3,\) for indices of shape \(4,\)"):
        infobatch(torch.ones(4), order, torch.ones(3))
    assert infobatch.seen == 0
    with pytest.raises(ValueError, match="all of them have a loss"):
        for _ in range(2):
            infobatch(torch.ones(4), order)


KINDS: dict[str, Any] = {
    **{str(dtype): lambda index, dtype=dtype: index.to(dtype) for dtype in (torch.int8, torch.uint8, torch.int32)},
    "numpy": lambda index: index.numpy().astype("int32"),
    "list": Tensor.tolist,
    "tuple": lambda index: (*index.tolist(),),
    "list of tensors": list,
}


@pytest.mark.parametrize("kind", KINDS)
def test_indices_of_every_kind_are_the_same_samples(kind: str) -> None:
    """In every method that takes indices, levels too."""
    both = [InfoBatch(50, epochs=3, policy="importance", budget=0.9, warn=str) for _ in range(2)]
    for _ in zip(*(one.epochs() for one in both), strict=True):
        for index in DataLoader(range(50), 8, sampler=both[0]):
            loss, found = torch.rand(len(index), generator=generator(index[0].item())), []
            for one, given in zip(both, (index, KINDS[kind](index)), strict=True):
                found.append([one.level(given), one.weight(given), one.global_batch_size(given), one(loss, given)])
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*found, strict=True))
    assert torch.equal(both[0].score, both[1].score)


@pytest.mark.parametrize(
    "wrong", [None, 3, "ab", {1}, ["1"], [[0, 1]], [0.5], torch.ones(2, 1, dtype=torch.int64)], ids=str
)
def test_what_is_no_index_is_one_sentence(wrong: Any) -> None:
    infobatch = InfoBatch(9, epochs=2)
    step_once(infobatch)
    for method in (
        infobatch.level,
        infobatch.weight,
        infobatch.global_batch_size,
        lambda i: infobatch(torch.ones(2), i),
    ):
        with pytest.raises(ValueError, match=r"^index must (be integers|have one axis), .*got") as error:
            method(wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [{"train": [1]}, "data", b"data", DataLoader([1, 2]), 3.0, (x for x in "ab")],
    ids=lambda wrong: type(wrong).__name__,
)
def test_what_is_no_map_style_data_set_raises(wrong: Any) -> None:
    for take in (lambda data: InfoBatch(data, epochs=1), Indexed):
        with pytest.raises(TypeError, match="needs a map-style data set"):
            take(wrong)


def test_a_batch_of_indices_is_not_one_sample() -> None:
    infobatch = InfoBatch(9, epochs=2)
    step_once(infobatch)
    with pytest.raises(TypeError, match="Indexed takes the index of one sample, got list"):
        next(iter(DataLoader(Indexed(range(9)), batch_size=None, sampler=BatchSampler(infobatch, 3, False))))


def test_a_finished_epoch_is_not_iterated_again() -> None:
    """Not by an evaluation with the same loader, nor by a loop that would wait for more batches forever."""

    def cycle(loader: DataLoader) -> Iterator[Tensor]:
        while True:
            yield from loader

    infobatch = InfoBatch(40, epochs=4, prune_ratio=0.9)
    loader = DataLoader(range(40), 8, sampler=infobatch)
    batches = cycle(loader)
    with pytest.raises(ValueError, match=r"epoch 1 is over, all of its .* samples have a loss"):
        for _ in infobatch.epochs():
            for _ in range(5):
                index = next(batches)
                infobatch(0.1 + index.float(), index)
    state = infobatch.state_dict()  # after the last step of the epoch, it is resumed and closed
    again = InfoBatch(40, epochs=4, prune_ratio=0.9)
    again.load_state_dict(state)
    assert next(again.epochs()) == 1 and not list(again)


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("kind", ["means", "equal", "per sample"])
def test_means_of_batches_in_place_of_losses_are_reported(kind: str, batch_size: int) -> None:
    messages: list[str] = []
    infobatch = InfoBatch(40, epochs=2, warn=messages.append)
    for _ in infobatch.epochs():
        for index in DataLoader(range(40), batch_size, sampler=infobatch):
            losses = torch.ones(len(index)) if kind == "equal" else 0.1 + index.float()
            infobatch(losses.mean().expand(len(index)) if kind == "means" else losses, index)
    expected = 2 * (kind == "means" and batch_size > 1)
    assert len(messages) == expected and all("seem to be its mean" in message for message in messages)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 1, 9], "no sample 9, there are 9"),
        ([0, -11, 2], "no sample -11"),
        ([3, 1, 3], "sample 3 was scored twice"),
        ([-1, 1, 1], "sample 1 was scored twice"),
    ],
)
def test_an_index_out_of_range_or_passed_twice_raises(index: list[int], message: str) -> None:
    infobatch = InfoBatch(9, epochs=2)
    step_once(infobatch)
    with pytest.raises(ValueError, match=message):
        infobatch(torch.ones(3), torch.tensor(index))


def test_a_sample_of_an_earlier_step_raises() -> None:
    infobatch = InfoBatch(9, epochs=2)
    step_once(infobatch)
    infobatch(torch.ones(2), torch.tensor([4, 5]))
    with pytest.raises(ValueError, match="sample 5 was scored twice"):
        infobatch(torch.ones(2), torch.tensor([6, 5]))


def test_indices_of_another_sampler_raise() -> None:
    losses = torch.linspace(0.1, 1, 100)
    infobatch = InfoBatch(100, epochs=4, anneal=0.0)
    with pytest.raises(ValueError, match="was scored in epoch 1, which does not use it"):
        for _ in infobatch.epochs():
            for index in torch.randperm(100, generator=generator(3))[: infobatch.length].split(10):
                infobatch(losses[index], index)


@pytest.mark.parametrize("skip", ["second shard", "first", "last", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_samples_that_are_never_passed_are_reported_in_their_epoch(seed: int, skip: str) -> None:
    """A second sharding of the batches, batches that are skipped after a resume, a loop that ends early."""
    rng, messages, expected = random.Random(seed), [], []
    size, batch = rng.randint(40, 90), rng.randint(3, 9)
    infobatch = InfoBatch(size, epochs=3, policy="full", warn=messages.append)
    for epoch in infobatch.epochs():
        batches = [*DataLoader(range(size), batch, sampler=infobatch)]
        few = rng.randrange(len(batches))
        kept = {"second shard": batches[::2], "first": batches[few:], "last": batches[: few + 1]}.get(skip, batches)
        for index in kept:
            infobatch(torch.ones(len(index)), index)
        missing = size - sum(map(len, kept))
        if missing > max(map(len, kept)):  # less than a step's may be dropped on purpose
            expected.append(f"epoch {epoch + 1}: no loss was passed for {missing} of {size} samples")
    assert len(messages) == len(expected) and all(map(str.startswith, messages, expected))
    assert all("accelerator.prepare" in message and "use_distributed_sampler=False" in message for message in messages)
    assert bool(expected) or skip != "second shard"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_misuse_raises() -> None:
    with pytest.raises(ValueError, match="loop with `for epoch in infobatch"):
        iter(InfoBatch(3, epochs=1))
    with pytest.raises(ValueError, match="no loss was passed"):
        list(InfoBatch(3, epochs=2).epochs())
    for stream in (Stream(), iter([1])):
        with pytest.raises(TypeError, match="whose samples have an index"):
            InfoBatch(stream, epochs=1)  # pyright: ignore[reportArgumentType]
    for wrong, message in (
        ({"prune_ratio": 1.0}, r"ratio must be in \[0, 1\), got 1.0"),
        ({"prune_ratio": -0.1}, "ratio"),
        ({"anneal": 2}, r"anneal must be in \[0, 1\]"),
        ({"smoothing": 1}, "smoothing"),
        ({"rank": 1, "world": 1}, "rank"),
        ({"rank": 1}, "belong together"),
        ({"epochs": 0}, "epochs"),
        ({"policy": "infobach"}, "there are full, random, infobatch"),
        ({"budget": 0.5}, r"infobatch takes no budget \(.* share\); random, importance do"),
        (SAMPLES, "needs a budget"),
        (
            {"policy": "importance", "over": "samples", "budget": 0.5, "prune_ratio": 0.5},
            "no setting 'prune_ratio'; it has floor",
        ),
        (
            {"policy": "importance", "over": "samples", "budget": 0.1},
            "budget must be at least 0.17, got 0.1: every sample is used in 1 of 8 epochs",
        ),
        ({"policy": "importance", "budget": 0.5, "over": "pixels"}, "samples, levels or both"),
    ):
        with pytest.raises(ValueError, match=message):
            InfoBatch(3, **{"epochs": 8} | wrong)
    with pytest.raises(ValueError, match="state is of 3 samples"):
        InfoBatch(4, epochs=2).load_state_dict(InfoBatch(3, epochs=2).state_dict())
    with pytest.raises(ValueError, match="negative"):
        list(run(InfoBatch(3, epochs=2), -torch.ones(3)))


def test_a_data_set_that_changes_its_length_raises() -> None:
    data = [0.5] * 20
    infobatch = InfoBatch(data, epochs=3)
    with pytest.raises(ValueError, match="had 20 samples and has 19 now"):
        for _ in infobatch.epochs():
            for index in DataLoader(range(20), 6, sampler=infobatch):
                infobatch(torch.ones(len(index)), index)
            data.pop()


def test_a_launch_without_a_process_group_raises(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"after torch\.distributed\.init_process_group"):
        InfoBatch(3, epochs=1)
    assert InfoBatch(3, epochs=1, rank=0, world=2).world == 2


def test_a_process_group_that_is_made_later_is_noticed(monkeypatch) -> None:
    """As in processes of torch.multiprocessing.spawn, which have no WORLD_SIZE."""
    infobatch, fixed = InfoBatch(3, epochs=1), InfoBatch(3, epochs=1, rank=0, world=1)
    monkeypatch.setattr(collectives, "rank_and_world_size", lambda: (1, 2))
    with pytest.raises(ValueError, match="made for rank 0 of 1, and this is rank 1 of 2"):
        next(infobatch.epochs())
    next(fixed.epochs())


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"prune_ratio": 0.4}, {"size": 29}, {"policy": "full"}, {"resumed": True}, {}], ids=str
)
def test_ranks_that_plan_differently_are_noticed_before_a_step(other: dict[str, Any]) -> None:
    """By a maximum over ranks, as torch.distributed makes it; here of the plans of two ranks in one process."""
    sent: list[Tensor] = []
    other, resumed = {**other}, other.get("resumed")
    size = other.pop("size", 30)
    settings: dict[str, Any] = {"epochs": 4, "world": 2, "anneal": 0}
    other.pop("resumed", None)

    def send(table: Tensor) -> Tensor:
        sent.append(table)
        return table

    first = InfoBatch(30, rank=0, merge=send, **settings)
    second = InfoBatch(size, rank=1, merge=lambda table: torch.maximum(table, sent[-1]), **settings | other)
    state = first.state_dict() | {"score": torch.linspace(0, 1, 30), "epoch": 1}
    first.load_state_dict(state)
    if size == 30 and not resumed:
        second.load_state_dict(state)
    next(first.epochs())
    if other or resumed or size != 30:
        with pytest.raises(ValueError, match="the ranks have planned different epochs"):
            next(second.epochs())
    else:
        next(second.epochs())


def test_what_is_no_state_raises_and_changes_nothing() -> None:
    """Other checkpoints, parts that are missing, damaged or of another run."""
    losses = torch.rand(30, generator=generator(0)) + 0.1

    def stopped(steps: int, epochs: int = 6, **settings: Any) -> InfoBatch:
        infobatch = InfoBatch(30, epochs=epochs, **settings)
        for step, _ in enumerate(run(infobatch, losses)):
            if step == steps:
                break
        return infobatch

    good = stopped(7).state_dict()
    cases: list[Any] = [None, {}, [], torch.nn.Linear(2, 2).state_dict(), {"infobatch": good}]
    cases += [{name: value for name, value in good.items() if name != gone} for gone in good]
    cases += [good | {name: wrong} for name in good for wrong in ("text", None, torch.ones(2, 3), -1)]
    cases += [
        good | {"seen": 29},
        good | {"seen": 10**9},
        good | {"epoch": 99},
        good | {"loss": torch.full((30,), torch.nan)},
    ]
    cases += [stopped(30, seed=1).state_dict(), InfoBatch(31, epochs=6).state_dict(), stopped(99, 9).state_dict()]
    whole = [(epoch, index.tolist()) for epoch, index in run(stopped(3), losses)]
    refused = 0
    for case in cases:
        infobatch = stopped(3)
        try:
            infobatch.load_state_dict(case)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 300
            assert [(epoch, index.tolist()) for epoch, index in run(infobatch, losses)] == whole
    assert refused >= len(cases) - 6  # -1 or 3 numbers may be read as `merged` or `plan`
    for name, number in itertools.product(("score", "levels", "reliability"), (torch.inf, -torch.inf)):
        with pytest.raises(ValueError, match=f"the state is damaged: {name} can't be those of an InfoBatch"):
            stopped(3).load_state_dict(good | {name: torch.full_like(good[name], number)})
    converted = {
        name: value.numpy() if isinstance(value, Tensor) else torch.tensor(value) for name, value in good.items()
    }
    for kind in (good, converted):
        infobatch = InfoBatch(30, epochs=6)
        infobatch.load_state_dict(kind)
        assert torch.equal(infobatch.score.nan_to_num(), good["score"].nan_to_num()) and infobatch.seen == good["seen"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_batches_and_samples_that_a_loop_skips_come_after_a_resume(seed: int, workers: int) -> None:
    """Whatever was skipped before a state was taken, the resumed epoch has all samples without a loss, once each."""
    rng = random.Random(seed)
    size, batch = rng.randint(20, 60), rng.randint(1, 9)
    infobatch = InfoBatch(size, epochs=3, warn=lambda _: None)
    stop, used = rng.randint(1, 2 * size), 0
    for _ in infobatch.epochs():
        done: list[int] = []
        for index in DataLoader(range(size), batch, sampler=infobatch):
            kept = index[torch.rand(len(index), generator=generator(seed, used)) < 0.7]
            infobatch(torch.rand(len(kept), generator=generator(seed, used)), kept)  # also if none is left
            done, used = [*done, *kept.tolist()], used + len(index)
            if used >= stop:
                break
        if used >= stop:
            break
    resumed = infobatch
    for _ in range(2):  # and again after a second stop
        state = resumed.state_dict()
        resumed = InfoBatch(size, epochs=3, warn=lambda _: None)
        resumed.load_state_dict(state)
        assert resumed.seen in (0, len(done))
        left = [*DataLoader(range(size), batch, sampler=resumed, num_workers=workers)] if resumed.seen else []
        rest = [sample for index in left for sample in index.tolist()]
        assert not left or sorted([*done, *rest]) == sorted(resumed.plan.order.tolist())
        for index in left[:1]:
            resumed(torch.ones(len(index)), index)
            done += index.tolist()
