"""The training loop of the tasks in this folder: adapter, InfoBatch and model."""

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
    """Settings of the training.

    Attributes:
        epochs: passes over the data.
        batch_size: samples per step.
        lr: initial learning rate of AdamW; it decreases linearly to 0.
        policy: how samples are selected: full, infobatch, quantile, or with a budget random, importance.
        budget: samples used in the whole training as a share of epochs * data set, in (0, 1].
        seed: of the parameters and of InfoBatch.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    policy: str = "infobatch"
    budget: float | None = None
    seed: int = 0


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def epoch_batches(images: Images, batch_size: int, infobatch: InfoBatch) -> Iterator[Batch]:
    """The batches of InfoBatch's current epoch, on the device, augmented."""
    for batch, _ in make_loader(images, EpochSampler(infobatch), batch_size):
        yield images.augmented(on_device(batch, device()), infobatch.epoch)


def fit(
    training: Training,
    model: nn.Module,
    adapter: Callable[..., Any],
    size: int,
    batches: Callable[[InfoBatch], Iterable[Any]],
) -> InfoBatch:
    """Train a model and print a line per epoch.

    Args:
        training: the settings.
        model: the network, on its device.
        adapter: the objective; returns one loss per sample for (model, batch, rng).
        size: samples in the data set.
        batches: returns the batches of an epoch, on the device, in the order of the sampler that it is given; each has
            an `index`.

    Returns:
        The InfoBatch, at the end of the training.

    Raises:
        UserError: there is no such policy, or it does not fit the budget.
    """
    settings = {"policy": training.policy, "budget": training.budget, "seed": training.seed}
    try:
        infobatch = InfoBatch(size, epochs=training.epochs, warn=print, **settings)
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
        known = infobatch.reliability
        reliability = "" if known is None else f"  reliability of scores {known:.2f}"
        print(
            f"epoch {epoch + 1}/{training.epochs}  loss {infobatch.mean():.4f}  {infobatch.seen:,} samples{reliability}"
        )
    model.eval()
    print(f"{infobatch.samples_used:,} samples used instead of {size * training.epochs:,}")
    return infobatch
