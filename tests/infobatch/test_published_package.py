"""Known bugs of the package published with the paper (ICLR 2024), tested on this one."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from pretrain import Indexed, InfoBatch
from pretrain.core.rng import generator

SIZE = 3000  # above what half precision counts exactly: 256 in bfloat16, 2048 in float16


def losses() -> Tensor:
    return 0.1 + torch.rand(SIZE, generator=generator(0))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_sampler", [False, True])
def test_an_epoch_ends_and_is_pruned_however_often_a_batch_sampler_iterates(
    drop_last: bool, batch_sampler: bool
) -> None:
    """There, the first epoch never ends, or no sample is ever pruned."""
    infobatch = InfoBatch(SIZE, epochs=8)
    by_sample = {"batch_size": 64, "sampler": infobatch, "drop_last": drop_last}
    by_batch = {"batch_sampler": torch.utils.data.BatchSampler(infobatch, 64, drop_last)}
    loader = DataLoader(Indexed(losses()), **(by_batch if batch_sampler else by_sample))
    lengths = []
    for _ in infobatch.epochs():
        batches = len(loader)  # this epoch's, not the last one's
        seen = [index for index, loss in loader for _ in [infobatch(loss, index)]]
        lengths.append(len(torch.cat(seen)))
        assert len(seen) == batches
    assert all(length < 0.8 * SIZE for length in lengths[1:7]) and lengths[0] > SIZE - 64 < lengths[7] + 1


def test_indices_are_right_under_a_loader_that_fetches_ahead() -> None:
    """There, every index is wrong under accelerate, which fetches the next batch before it yields this one."""
    infobatch = InfoBatch(SIZE, epochs=2, policy="full", smoothing=0.0)
    loader = Accelerator(cpu=True).prepare(DataLoader(Indexed(losses()), 64, sampler=infobatch))
    for _ in infobatch.epochs():
        for index, loss in loader:
            infobatch(loss, index)
    assert torch.equal(infobatch.score.argsort(), losses().argsort())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_in_half_precision_goes_to_its_sample(dtype: torch.dtype) -> None:
    """There, indices are gathered in the losses' dtype."""
    infobatch = InfoBatch(SIZE, epochs=1, smoothing=0.0)
    for _ in infobatch.epochs():
        for index, loss in DataLoader(Indexed(losses()), 64, sampler=infobatch):
            infobatch(loss.to(dtype), index)
    expected = losses().to(dtype).float()
    torch.testing.assert_close(infobatch.score / infobatch.score.mean(), expected / expected.mean())


@pytest.mark.parametrize("epochs", [8, 9, 10, 30, 90, 100])
def test_annealing_leaves_no_weight_for_any_number_of_epochs(epochs: int) -> None:
    """There, unless 7/8 of the epochs is a whole number, the last ones train with weights of two."""
    infobatch = InfoBatch(40, epochs=epochs)
    pruned = []
    for epoch in infobatch.epochs():
        weights = []
        for index, loss in DataLoader(Indexed(losses()[:40]), 16, sampler=infobatch):
            weights.append(infobatch(torch.ones_like(loss), index, score=loss).item() * len(index))
        pruned.append(infobatch.seen < 40)
        assert sum(weights) == pytest.approx(40)
        if epoch >= epochs * 7 / 8:
            assert infobatch.plan.weight.eq(1).all() and not pruned[-1]
    assert any(pruned)


def test_a_loss_is_not_changed_in_place() -> None:
    """There, it is multiplied in place, which breaks losses whose gradient needs their value."""
    infobatch = InfoBatch(40, epochs=3)
    parameter = torch.ones(40, requires_grad=True)
    for _ in infobatch.epochs():
        for (index,) in DataLoader(Indexed([()] * 40), 16, sampler=infobatch):
            loss = (parameter[index] * losses()[index]).sqrt()
            before = loss.detach().clone()
            infobatch(loss, index).backward()
            assert torch.equal(loss.detach(), before)


def test_infobatch_is_copied_and_pickled() -> None:
    """There, both recurse forever: no spawned workers."""
    infobatch = InfoBatch(40, epochs=3, policy="importance", budget=0.8)
    next(infobatch.epochs())
    for other in (copy.deepcopy(infobatch), pickle.loads(pickle.dumps(infobatch))):
        assert list(other) == list(infobatch)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_seed_has_an_effect_and_no_global_generator_has(seed: int) -> None:
    """There, every epoch seeds numpy's global generator by its number: all seeds prune alike."""
    orders = []
    for _ in range(2):
        torch.manual_seed(len(orders))
        infobatch = InfoBatch(SIZE, epochs=4, seed=seed)
        for _ in infobatch.epochs():
            orders.append(list(infobatch))
            for index, loss in DataLoader(Indexed(losses()), 512, sampler=infobatch):
                infobatch(loss, index)
    assert orders[:4] == orders[4:]
    other = InfoBatch(SIZE, epochs=4, seed=seed + 1)
    next(other.epochs())
    assert list(other) != orders[0]
