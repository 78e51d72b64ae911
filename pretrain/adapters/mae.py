"""Masked autoencoding of images."""

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from pretrain.adapter import Batch, Losses, bare
from pretrain.rng import Draws


@dataclass(frozen=True)
class MAE:
    """Predict the hidden patches of an image from the visible ones (He et al. 2022).

    The loss of a sample is the mean squared error over its hidden patches. Masks are drawn by sample, so
    (seed, epoch, index) gives a mask back anywhere.

    Attributes:
        mask_ratio: share of the patches hidden, in (0, 1).
        norm_pix: predict each patch less its mean and divided by its standard deviation.
    """

    mask_ratio: float = 0.75
    norm_pix: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")

    def masks(self, patches: int, rng: Draws) -> tuple[Tensor, Tensor]:
        """Which patches are visible and which hidden: int64 [B, V] and [B, L - V], at least one of each."""
        visible = min(max(round(patches * (1 - self.mask_ratio)), 1), patches - 1)
        order = rng.uniform(patches).argsort(dim=1)
        return order[:, :visible], order[:, visible:]

    def targets(self, patch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to predict for patches [B, L, P], and the mean and scale [B, L, 1] that lead back to pixels."""
        if not self.norm_pix:
            return patch, torch.zeros_like(patch[..., :1]), torch.ones_like(patch[..., :1])
        if patch.shape[-1] < 2:
            raise ValueError(
                "norm_pix needs patches of two or more values; give a larger --model.patch or --adapter.no-norm-pix"
            )
        mean = patch.mean(dim=-1, keepdim=True)
        scale = (patch.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        return (patch - mean) / scale, mean, scale

    def __call__(self, model: nn.Module, batch: Batch, rng: Draws) -> Losses:
        """One forward pass; the level is not used."""
        network = bare(model)
        visible, hidden = self.masks(network.patches, rng)
        target, _, _ = self.targets(network.patchify(batch.image))
        predicted = model(batch.image, visible)  # [B, L, P]
        error = reduce((predicted - target).square(), "b l p -> b l", "mean")
        return Losses(error.gather(1, hidden).mean(dim=1))

    def reconstruct(self, model: nn.Module, batch: Batch, rng: Draws) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] as the model sees them (hidden patches grey) and as it completes them.

        Under `norm_pix` the network does not predict a patch's mean and contrast; the original's are put back.
        """
        network = bare(model)
        visible, _ = self.masks(network.patches, rng)
        patch = network.patchify(batch.image)
        _, mean, scale = self.targets(patch)
        shown = torch.zeros_like(patch[..., 0], dtype=torch.bool).scatter(1, visible, True)
        shown = rearrange(shown, "b l -> b l 1")
        completed = torch.where(shown, patch, model(batch.image, visible) * scale + mean)
        return network.unpatchify(torch.where(shown, patch, 0.0)), network.unpatchify(completed)
