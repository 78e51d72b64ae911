"""Semantic segmentation as an objective."""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.adapters import Losses
from pretrain.core.rng import SampleRNG

IGNORED = 255  # in a mask: a pixel without a class


class Masked(NamedTuple):
    """A batch of images with masks."""

    image: Tensor  # float32 [B, C, H, W] in [-1, 1]
    mask: Tensor  # int64 [B, H, W]; the class of each pixel, or IGNORED
    index: Tensor  # int64 [B]; the samples


@dataclass(frozen=True)
class Segmentation:
    """Cross entropy per pixel, averaged over the valid pixels of each image; 0 for an image that has none."""

    def __call__(self, model: nn.Module, batch: Masked, rng: SampleRNG | None = None) -> Losses:
        """One forward pass; uses no rng."""
        loss = F.cross_entropy(model(batch.image).float(), batch.mask, reduction="none", ignore_index=IGNORED)
        valid = (batch.mask != IGNORED).sum(dim=(1, 2))
        return Losses(loss.sum(dim=(1, 2)) / valid.clamp(min=1))
