"""Masked autoencoding of images."""

from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor, nn

from pretrain.adapter import Batch, Losses, bare
from pretrain.rng import Draws


@dataclass(frozen=True)
class MAE:
    """Predict the hidden patches of an image from the visible ones (He et al. 2022).

    The loss of a sample is the mean squared error over its hidden patches, or over some of them, chosen by chance:
    with a decoder in which they don't know of each other its expectation is the same. Masks are drawn by sample, so
    (seed, epoch, index) gives a mask back anywhere.

    Attributes:
        mask_ratio: share of the patches hidden, in (0, 1).
        predict: share of the hidden patches that a visit in training predicts, in (0, 1]; the decoder is spared others.
        norm_pix: predict each patch less its mean and divided by its standard deviation.
    """

    mask_ratio: float = 0.75
    predict: float = 1.0
    norm_pix: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")
        if not 0 < self.predict <= 1:
            raise ValueError(f"predict must be in (0, 1], got {self.predict}")

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
        if network.training:
            hidden = hidden[:, : max(round(self.predict * hidden.shape[1]), 1)]  # they are in random order
        target, _, _ = self.targets(network.patchify(batch.image))
        predicted = model(batch.image, visible, hidden)
        error = predicted - target.gather(1, hidden[..., None].expand(-1, -1, target.shape[-1]))
        return Losses(reduce(error.square(), "b l p -> b", "mean"))

    def reconstruct(self, model: nn.Module, batch: Batch, rng: Draws) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] as the model sees them (hidden patches grey) and as it completes them.

        Under `norm_pix` the network does not predict a patch's mean and contrast; the original's are put back.
        """
        network = bare(model)
        visible, hidden = self.masks(network.patches, rng)
        patch = network.patchify(batch.image)
        _, mean, scale = self.targets(patch)
        place = hidden[..., None].expand(-1, -1, patch.shape[-1])
        predicted = torch.zeros_like(patch).scatter(1, place, model(batch.image, visible, hidden).float())
        shown = torch.zeros_like(patch[..., :1], dtype=torch.bool).scatter(1, visible[..., None], True)
        completed = torch.where(shown, patch, predicted * scale + mean)
        return network.unpatchify(torch.where(shown, patch, 0.0)), network.unpatchify(completed)
