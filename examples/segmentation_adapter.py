"""Semantic segmentation as an objective, with masks that are made from the images."""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from pretrain.adapters import Batch, Losses
from pretrain.core.rng import SampleRNG


@dataclass(frozen=True)
class Segmentation:
    """Cross entropy of every pixel, averaged over the image.

    Attributes:
        background: the class of pixels where nothing is shown.
        threshold: brightness, in [-1, 1], above which a pixel shows what the image is labelled with.
    """

    background: int = 10
    threshold: float = -0.5

    def masks(self, batch: Batch) -> Tensor:
        """int64 [B, H, W]; the class of every pixel."""
        shown = reduce(batch.image, "b c h w -> b h w", "mean") > self.threshold
        return rearrange(batch.label, "b -> b 1 1").where(shown, self.background)

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """One forward pass; neither level nor rng is used."""
        loss = F.cross_entropy(model(batch.image).float(), self.masks(batch), reduction="none")
        return Losses(reduce(loss, "b h w -> b", "mean"))
