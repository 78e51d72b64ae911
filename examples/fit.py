"""The loop that the tasks in this folder share: adapter, InfoBatch and model, and nothing else."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrain import InfoBatch
from pretrain.adapters import Batch
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data.images import Images, on_device
from pretrain.data.loader import EpochSampler, make_loader


@dataclass(frozen=True)
class Training:
    """How long and on whom.

    Attributes:
        epochs: passes over the data.
        batch_size: samples of a step.
        lr: peak learning rate of AdamW; it falls to 0 over the training.
        policy: which samples are used: full, infobatch, quantile, or with a budget random, importance.
        budget: share of the visits to spend.
        seed: of parameters and plans.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    policy: str = "infobatch"
    budget: float | None = None
    seed: int = 0


def device() -> torch.device:
    """A GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def visits(images: Images, batch_size: int, infobatch: InfoBatch) -> Iterator[Batch]:
    """An epoch's batches, on the device, cropped and flipped."""
    for batch, _ in make_loader(images, EpochSampler(infobatch), batch_size):
        yield images.augmented(on_device(batch, device()), infobatch.epoch)


def fit(
    training: Training,
    model: nn.Module,
    adapter: Callable[..., Any],
    size: int,
    batches: Callable[[InfoBatch], Iterable[Any]],
) -> InfoBatch:
    """Train, and print a line an epoch.

    Args:
        training: how long and on whom.
        model: the network, on its device.
        adapter: turns model, batch and rng into one loss per sample.
        size: samples in the data set.
        batches: an epoch's batches, on the device, in the order of the sampler it is given; each has an `index`.

    Raises:
        UserError: there is no such policy, or it can't be used so.
    """
    how = {"policy": training.policy, "budget": training.budget, "seed": training.seed}
    try:
        infobatch = InfoBatch(size, epochs=training.epochs, warn=print, **how)
    except ValueError as error:
        raise UserError(str(error)) from None
    optimizer = torch.optim.AdamW(model.parameters(), training.lr)
    for epoch in infobatch.epochs():
        model.train()
        for batch in batches(infobatch):
            optimizer.param_groups[0]["lr"] = training.lr * (1 - infobatch.progress)
            losses = adapter(model, batch, SampleRNG(training.seed, epoch, index=batch.index))
            optimizer.zero_grad()
            infobatch(losses.loss, batch.index, losses.score).backward()
            optimizer.step()
        sure = "" if infobatch.reliability is None else f"  reliability {infobatch.reliability:.2f}"
        print(f"epoch {epoch + 1}/{training.epochs}  loss {infobatch.mean():.4f}  {infobatch.seen:,} visited{sure}")
    model.eval()
    print(f"{infobatch.samples_used:,} visits instead of {size * training.epochs:,}")
    return infobatch
