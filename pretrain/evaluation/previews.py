"""Pictures of what a model does: objects that are called as ``picture(model)`` and return uint8 [H, W, C], or None."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from pretrain.adapters import Batch, Generative
from pretrain.adapters._sampling import check_sampling, generate
from pretrain.config.schema import Evaluate
from pretrain.core.errors import UserError, warn
from pretrain.core.rng import SampleRNG
from pretrain.data.autoencoder import Autoencoder
from pretrain.data.grid import grid
from pretrain.data.images import Images, on_device
from pretrain.distributed.collectives import all_gather_rows, all_gather_set, rank_and_world_size
from pretrain.evaluation.context import some_batch

T = TypeVar("T")


def attempt(make: Callable[[], T]) -> T | None:
    """Call a function, so that its failure does not end a training: no picture is needed for training.

    All processes must call it.

    Returns:
        What the function returns; None, with a warning, if it raises an exception on any process.

    Raises:
        UserError: as the function raises it, for example for an unreadable image.
    """
    result, messages = None, set()
    try:
        result = make()
    except UserError:
        raise
    except Exception as error:  # components of the user can raise exceptions of any type
        messages = {f"{type(error).__name__}: {' '.join(str(error).split())}"}
    messages = all_gather_set(messages)
    if not messages:
        return result
    warn(f"the picture can't be made ({min(messages)}); the training continues without it")
    return None


@dataclass(frozen=True)
class GeneratedImages:
    """Images generated from the same noise in every call, so that the pictures of a run are comparable.

    Attributes:
        adapter: provides the noise scheduler.
        shape: (C, H, W) of an image, or of its latent.
        classes: image n is of class n modulo `classes`; 0: without labels.
        settings: number of images, and how they are generated.
        seed: of the noise.
        autoencoder: decodes latents.
    """

    adapter: Generative
    shape: tuple[int, int, int]
    classes: int
    settings: Evaluate
    seed: int
    autoencoder: Autoencoder | None = None

    def __post_init__(self) -> None:
        """Raise `UserError` for settings that would fail when the first picture is made."""
        given = self.settings
        if isinstance(self.adapter, Generative):
            check_sampling(
                self.adapter,
                self.classes,
                None,
                given.steps,
                given.guidance,
                "--evaluate.",
                interval=given.guidance_interval,
            )

    def __call__(self, model: nn.Module) -> Tensor | None:
        """The images as a grid, or None, see `attempt`; the processes share them, and all must call it."""
        rank, world = rank_and_world_size()
        number = torch.arange(rank, self.settings.images, world, device=next(model.parameters()).device)

        def share() -> list[Tensor]:
            noise = SampleRNG(self.seed, index=number).normal(*self.shape)
            label = number % self.classes if self.classes else torch.full_like(number, -1)
            given: dict[str, Any] = {"steps": self.settings.steps, "guidance": self.settings.guidance}
            given |= {"guidance_interval": self.settings.guidance_interval, "autoencoder": self.autoencoder}
            return [number, generate(model, self.adapter, noise, label, **given)] if len(number) else []

        if (columns := attempt(share)) is None:
            return None
        order, images = all_gather_rows(columns)
        return attempt(lambda: grid(images[order.argsort()], columns=round(self.settings.images**0.5)))


@dataclass(frozen=True)
class Reconstructions:
    """Validation images, four per row: the original, the visible patches, and the reconstruction.

    Attributes:
        adapter: has `reconstruct`.
        images: the validation images.
        count: number of images, a random subset that is always the same.
    """

    adapter: Any
    images: Images
    count: int

    def __call__(self, model: nn.Module) -> Tensor | None:
        """The images as a grid, or None, see `attempt`; all processes must call it."""
        return attempt(lambda: self.draw(model))

    @torch.no_grad()
    def draw(self, model: nn.Module) -> Tensor:
        """The images as a grid; exceptions of the adapter are not caught."""
        batch: Batch = on_device(some_batch(self.images, self.count), next(model.parameters()).device)
        visible, reconstructed = self.adapter.reconstruct(model, batch, SampleRNG(0, index=batch.index))
        triples = rearrange(torch.stack([batch.image, visible, reconstructed]), "n b c h w -> (b n) c h w")
        return grid(triples, columns=12)
