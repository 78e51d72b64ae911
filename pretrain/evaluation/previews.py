"""What a person looks at: each class's objects are called as ``picture(model)`` and give uint8 [H, W, C]."""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from pretrain.adapters import Batch, Generative
from pretrain.adapters._sampling import check_sampling, generate
from pretrain.core.rng import SampleRNG
from pretrain.data.autoencoder import Autoencoder
from pretrain.data.grid import grid
from pretrain.data.images import Images, on_device
from pretrain.distributed.collectives import all_gather_rows, rank_and_world_size


@dataclass(frozen=True)
class Generated:
    """Images made from the same noise each time, so that pictures of one run can be compared.

    Attributes:
        adapter: names the scheduler.
        shape: (C, H, W) of an image, or of its latent.
        classes: image n is of class n mod `classes`; 0: without labels.
        count: images.
        steps, guidance: see `generate`.
        seed: of the noise.
        autoencoder: decodes latents.
    """

    adapter: Generative
    shape: tuple[int, int, int]
    classes: int
    count: int
    steps: int
    guidance: float
    seed: int
    autoencoder: Autoencoder | None = None

    def __post_init__(self) -> None:
        """Refuse what would fail after hours of training."""
        if isinstance(self.adapter, Generative):
            check_sampling(self.adapter, self.classes, None, self.steps, self.guidance, "--evaluate.")

    def __call__(self, model: nn.Module) -> Tensor:
        """The picture; every process makes its share of it, and all of them must call it."""
        rank, world = rank_and_world_size()
        which = torch.arange(rank, self.count, world, device=next(model.parameters()).device)
        noise = SampleRNG(self.seed, index=which).normal(*self.shape)
        label = which % self.classes if self.classes else torch.full_like(which, -1)
        made = {"steps": self.steps, "guidance": self.guidance, "autoencoder": self.autoencoder}
        share = [which, generate(model, self.adapter, noise, label, **made)] if len(which) else []
        which, images = all_gather_rows(share)
        return grid(images[which.argsort()], columns=round(self.count**0.5))


@dataclass(frozen=True)
class Reconstructed:
    """Held-out images, four to a row: the original, what the model sees of it, and how it completes it.

    Attributes:
        adapter: has `reconstruct`.
        images: held-out ones.
        count: images, the first ones.
    """

    adapter: Any
    images: Images
    count: int

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Tensor:
        """The picture."""
        plain = next(self.images.batches(range(len(self.images)), self.count))
        batch: Batch = on_device(plain, next(model.parameters()).device)
        seen, completed = self.adapter.reconstruct(model, batch, SampleRNG(0, index=batch.index))
        triples = rearrange(torch.stack([batch.image, seen, completed]), "n b c h w -> (b n) c h w")
        return grid(triples, columns=12)
