"""Masked autoencoding of images."""

from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor, nn

from pretrain.adapters import Batch, Losses, bare
from pretrain.adapters._uncertainty import Masks, random_masks
from pretrain.core.rng import SampleRNG


@dataclass(frozen=True)
class MAE:
    """Predict the hidden patches of an image from the visible ones (He et al. 2022).

    The loss of a sample is the mean squared error over its hidden patches, or over some of them, chosen by chance:
    with a decoder in which they don't know of each other its expectation is the same. Masks are drawn by sample, so
    (seed, epoch, index) gives a mask back anywhere.

    Attributes:
        mask_ratio: share of the patches hidden, in (0, 1).
        most_masked: the share at level 1, where it varies: it rises evenly with the level, from `mask_ratio` at 0.
        predict: share of the hidden patches that a visit in training predicts, in (0, 1]; the decoder is spared others.
        norm_pix: predict each patch less its mean and divided by its standard deviation.
    """

    mask_ratio: float = 0.75
    most_masked: float | None = None
    predict: float = 1.0
    norm_pix: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")
        if self.most_masked is not None and not self.mask_ratio < self.most_masked < 1:
            raise ValueError(f"most_masked must be above mask_ratio and below 1, got {self.most_masked}")
        if not 0 < self.predict <= 1:
            raise ValueError(f"predict must be in (0, 1], got {self.predict}")

    def masks(self, patches: int, level: Tensor, rng: SampleRNG, share: float = 1.0) -> Masks:
        """See `random_masks`."""
        return random_masks(patches, self.mask_ratio, self.most_masked, share, level, rng)

    def targets(self, patch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to predict for patches [B, L, P], and the mean and scale [B, L, 1] that lead back to pixels."""
        if not self.norm_pix:
            return patch, torch.zeros_like(patch[..., :1]), torch.ones_like(patch[..., :1])
        if patch.shape[-1] < 2:
            raise ValueError("norm_pix needs patches of two or more values; give --adapter.no-norm-pix")
        mean, scale = patch.mean(dim=-1, keepdim=True), (patch.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        return (patch - mean) / scale, mean, scale

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """One forward pass."""
        network = bare(model)
        share = self.predict if network.training else 1.0
        visible, hidden, there = self.masks(network.patches, batch.level, rng, share)
        target, _, _ = self.targets(network.patchify(batch.image))
        predicted = model(batch.image, visible, hidden, there)
        error = reduce((predicted - target.take_along_dim(hidden[..., None], 1)).square(), "b h p -> b h", "mean")
        if there is None:
            return Losses(error.mean(dim=1))
        meant = there[:, visible.shape[1] :]
        return Losses(torch.where(meant, error, 0.0).sum(dim=1) / meant.sum(dim=1))

    def reconstruct(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] as seen and as completed; under `norm_pix` their own mean and contrast are put back."""
        network = bare(model)
        visible, hidden, there = self.masks(network.patches, batch.level, rng)
        patch = network.patchify(batch.image)
        _, mean, scale = self.targets(patch)
        place = hidden[..., None].expand(-1, -1, patch.shape[-1])
        predicted = torch.zeros_like(patch).scatter(1, place, model(batch.image, visible, hidden, there).float())
        known = torch.ones_like(visible).bool() if there is None else there[:, : visible.shape[1]]
        shown = torch.zeros_like(patch[..., :1], dtype=torch.bool).scatter(1, visible[..., None], known[..., None])
        completed = torch.where(shown, patch, predicted * scale + mean)
        return network.unpatchify(torch.where(shown, patch, 0.0)), network.unpatchify(completed)
