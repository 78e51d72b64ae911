"""What is evaluated, and the walk over images that evaluators share among the processes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.adapters import Batch, Generative
from pretrain.config.schema import Evaluate
from pretrain.core.errors import UserError
from pretrain.data.images import Images, on_device
from pretrain.data.sources import Source
from pretrain.distributed.collectives import all_gather_rows, rank_and_world_size

BATCH = 64  # images at once. The number is part of a result's last digits, so it does not depend on the processes.
LEAST = 4  # labelled images that something is learned from


@dataclass(frozen=True)
class EvalContext:
    """What evaluators are made for.

    Attributes:
        adapter: the objective.
        source: the data.
        classes: that the network knows; 0: none.
        has_encoder: whether the network has an `encoder`, which turns images [B, C, H, W] into features [B, D].
        settings: how it is measured.
        flag: what a setting's name begins with on the command line: "--evaluate." of a run in training.
    """

    adapter: Any
    source: Source
    classes: int
    has_encoder: bool
    settings: Evaluate
    flag: str = "--"

    @property
    def training(self) -> bool:
        """Whether the model is being trained."""
        return self.flag == "--evaluate."

    @property
    def makes_images(self) -> bool:
        """Whether the model can generate."""
        return isinstance(self.adapter, Generative)

    @property
    def objective(self) -> str:
        """Its name."""
        return type(self.adapter).__name__


def together(parts: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Rows that all processes found, in the order of the first column, which is left out; on every one, on the CPU."""
    rows = [torch.cat(column) for column in zip(*parts, strict=True)]
    number, *columns = all_gather_rows(rows)
    order = number.argsort()
    return [column[order] for column in columns]


def over(
    images: Images, index: Sequence[int], device: torch.device, rows: Callable[[Batch], tuple[Tensor, ...]]
) -> list[Tensor]:
    """What `rows` makes of a batch, a row per image, for all these images: spread over the processes.

    Args:
        images: read as they are; unreadable ones are left out.
        index: which, rising.
        device: that batches are moved to.
        rows: tensors with a row for each image of the batch.

    Returns:
        The tensors with the rows of all images, in the order of `index`, on the CPU.
    """
    batches = (on_device(plain, device) for plain in images.batches(index, BATCH, *rank_and_world_size()))
    with torch.no_grad():
        return together((batch.index, *rows(batch)) for batch in batches)


def over_seeds(measure: Callable[[int], dict[str, float]], seeds: int) -> dict[str, float]:
    """What is measured with each of so many seeds: NAME is the mean, NAME_std the standard deviation of several."""
    found = [measure(seed) for seed in range(seeds)]
    values = {name: torch.tensor([each[name] for each in found], dtype=torch.float64) for name in found[0]}
    spread = {f"{name}_std": value.std().item() for name, value in values.items() if seeds > 1}
    return {name: value.mean().item() for name, value in values.items()} | spread


def labelled(subject: EvalContext, names: list[str]) -> Tensor:
    """Which training images have labels, int64 [N].

    Raises:
        UserError: too few of them have, or none of the held-out ones.
    """
    train, test = (
        (torch.as_tensor(images.table["label"][:])[torch.from_numpy(images.rows)] >= 0).nonzero().flatten()
        for images in subject.source[:2]
    )
    if len(train) < LEAST or not len(test):
        raise UserError(
            f"{subject.flag}metrics {','.join(names)}: {len(train)} training and {len(test)} held-out images have "
            f"labels; it takes {LEAST} and 1"
        )
    return train


def evenly(images: Images, most: int) -> range:
    """At most so many of the images, evenly apart."""
    return range(0, len(images), -(-len(images) // most))
