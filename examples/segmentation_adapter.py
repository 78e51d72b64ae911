"""Semantic segmentation as an objective, with masks made from the images by a threshold."""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from pretrain.adapters import Batch, Losses
from pretrain.core.rng import SampleRNG


@dataclass(frozen=True)
class Segmentation:
    """Cross entropy per pixel, averaged over the image.

    Attributes:
        background: class of the background pixels.
        threshold: brightness in [-1, 1] above which a pixel has the class of its image.
    """

    background: int = 10
    threshold: float = -0.5

    def masks(self, batch: Batch) -> Tensor:
        """The class of each pixel, int64 [B, H, W]."""
        foreground = reduce(batch.image, "b c h w -> b h w", "mean") > self.threshold
        return rearrange(batch.label, "b -> b 1 1").where(foreground, self.background)

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """One forward pass; uses neither levels nor rng."""
        loss = F.cross_entropy(model(batch.image).float(), self.masks(batch), reduction="none")
        return Losses(reduce(loss, "b h w -> b", "mean"))
