"""The input of evaluators, and functions that several of them use."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.adapters import Batch, Generative
from pretrain.adapters._sampling import check_sampling, generate, make_scheduler
from pretrain.config.schema import Evaluate
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data.images import Images, on_device
from pretrain.data.sources import Source, some_rows
from pretrain.distributed.collectives import all_gather_rows, rank_and_world_size

BATCH_SIZE = 64  # The batch size changes the last digits of a result, so it does not depend on the number of processes.
MIN_LABELLED = 4  # training images with a label, for metrics that need labels


@dataclass(frozen=True)
class EvalContext:
    """What evaluators are constructed from.

    Attributes:
        adapter: the objective.
        source: the data.
        classes: number of classes of the network; 0: it has no label input.
        has_encoder: whether the network has an `encoder`, which maps images [B, C, H, W] to features [B, D].
        settings: how to evaluate.
        during_training: whether the model is being trained; False: `pretrain evaluate` measures a run.
        is_other_data: whether `source` is another data set than the one that the model was trained on.
    """

    adapter: Any
    source: Source
    classes: int
    has_encoder: bool
    settings: Evaluate
    during_training: bool = False
    is_other_data: bool = False

    def flag(self, setting: str) -> str:
        """The command-line flag of a setting: --evaluate.metrics of the training, --metrics of `pretrain evaluate`."""
        return f"--evaluate.{setting}" if self.during_training else f"--{setting}"

    def check_sampling(self) -> None:
        """Raise `UserError` if images can't be generated with the settings."""
        given = self.settings
        check_sampling(
            self.adapter,
            self.classes,
            given.sampler,
            given.steps,
            given.guidance,
            self.flag(""),
            interval=given.guidance_interval,
        )

    @property
    def generates(self) -> bool:
        """Whether the objective trains a model that generates images."""
        return isinstance(self.adapter, Generative)

    @property
    def objective(self) -> str:
        """Name of the objective."""
        return type(self.adapter).__name__


def gather_in_order(batches: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Concatenate batches of rows over all processes, sorted by their first column.

    All processes must call it.

    Args:
        batches: for each batch (number, *columns); number, int64 [B], is unique over all processes.

    Returns:
        The columns after the first one, on the CPU, the same on all processes.
    """
    rows = [torch.cat(column) for column in zip(*batches, strict=True)]
    number, *columns = all_gather_rows(rows)
    order = number.argsort()
    return [column[order] for column in columns]


def map_images(
    images: Images, index: Sequence[int], device: torch.device, function: Callable[[Batch], tuple[Tensor, ...]]
) -> list[Tensor]:
    """Apply a function to images in batches, which the processes share. All processes must call it.

    Args:
        images: read without augmentation; unreadable ones are left out.
        index: which images, in ascending order.
        device: where the batches are.
        function: returns tensors with a row for each image of the batch.

    Returns:
        These tensors for all images, in the order of `index`, on the CPU.
    """
    batches = (on_device(batch, device) for batch in images.batches(index, BATCH_SIZE, *rank_and_world_size()))
    with torch.no_grad():
        return gather_in_order((batch.index, *function(batch)) for batch in batches)


def map_generated(
    context: EvalContext, model: nn.Module, seed: int, function: Callable[[Tensor], Tensor], *, decode: bool = True
) -> Tensor:
    """Apply a function to generated images in batches, which the processes share. All processes must call it.

    The noise and the label of image n depend on the seed and n alone.

    Args:
        context: what is evaluated; its settings say how many images, and how they are generated.
        model: generates them, on its device.
        seed: of the noise.
        function: of images [B, C, H, W] in [-1, 1]; returns a tensor with a row for each.
        decode: decode latents to images.

    Returns:
        The rows of all images in their order, on the CPU.
    """
    settings, classes, device = context.settings, context.classes, next(model.parameters()).device
    rank, world = rank_and_world_size()

    def row(number: Tensor) -> tuple[Tensor, Tensor]:
        image = generate(
            model,
            context.adapter,
            SampleRNG(seed, index=number).normal(*context.source.shape),
            number % classes if classes else torch.full_like(number, -1),
            steps=settings.steps,
            guidance=settings.guidance,
            guidance_interval=settings.guidance_interval,
            sampler=settings.sampler,
            autoencoder=context.source.autoencoder if decode else None,
        )
        return number, function(image)

    batches = torch.arange(settings.num_images, device=device).split(BATCH_SIZE)[rank::world]
    return gather_in_order(map(row, batches))[0]


def describe_generated(context: EvalContext) -> str:
    """How images are generated, for notes."""
    settings = context.settings
    scheduler = type(make_scheduler(context.adapter, settings.sampler)).__name__
    interval = settings.guidance_interval
    between = "" if interval is None else f" between sigma {interval[0]:g} and {interval[1]:g}"
    return (
        f"{settings.num_images:,} images, generated by {settings.steps} steps of {scheduler} with guidance "
        f"{settings.guidance:g}{between}"
    )


def mean_over_seeds(measure: Callable[[int], dict[str, float]], seeds: int) -> dict[str, float]:
    """Call `measure` with each of the seeds 0, 1, ...

    Returns:
        NAME: the mean; with several seeds also NAME_std: the standard deviation.
    """
    found = [measure(seed) for seed in range(seeds)]
    values = {name: torch.tensor([each[name] for each in found], dtype=torch.float64) for name in found[0]}
    spread = {f"{name}_std": value.std().item() for name, value in values.items() if seeds > 1}
    return {name: value.mean().item() for name, value in values.items()} | spread


def labels_of(images: Images) -> Tensor:
    """Labels of images without reading them, int64 [N]; -1: none."""
    return torch.from_numpy(np.asarray(images.table["label"][:], dtype=np.int64)[images.rows])


def labelled(images: Images) -> Tensor:
    """Indices of the images with a label, int64."""
    return (labels_of(images) >= 0).nonzero().flatten()


def accuracy(predicted: Tensor, label: Tensor) -> float:
    """Share of the labelled images whose class was predicted.

    Args:
        predicted: int64 [N].
        label: int64 [N]; -1: none.

    Raises:
        UserError: no image has a label.
    """
    known = label >= 0
    if not known.any():
        raise UserError("no validation image with a label could be read, so no accuracy can be measured")
    return (predicted == label)[known].double().mean().item()


def some_images(images: Images, max_count: int) -> list[int]:
    """Indices of at most `max_count` images, ascending: a random subset, always the same one.

    Not every n-th image: where classes alternate, that would leave out whole classes.
    """
    return some_rows(np.arange(len(images)), max_count, 0).tolist()


def some_batch(images: Images, max_count: int) -> Batch:
    """Those of `some_images` that can be read, as a batch (uint8); if none of them can, the first others that can."""
    chosen = some_images(images, max_count)
    return next(images.batches([*chosen, *range(len(images))], len(chosen)))
