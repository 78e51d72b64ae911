"""InfoBatch: wrong losses, indices, settings and data sets raise errors."""

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pretrain import InfoBatch
from pretrain.core.rng import generator

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
    with pytest.raises(ValueError, match="all of them have a loss"):
        for _ in range(2):
            infobatch(torch.ones(4), order)


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
