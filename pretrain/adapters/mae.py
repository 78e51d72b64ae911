"""The objective of masked autoencoders."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import reduce
from torch import Tensor, nn

from pretrain.adapters import Batch, Losses, bare
from pretrain.adapters._masks import Masks, random_masks
from pretrain.core.rng import SampleRNG


@dataclass(frozen=True)
class MAE:
    """Predict the hidden patches of an image from the visible ones (He et al., 2022).

    The loss of a sample is the mean squared error over its hidden patches, or over a random subset of them; if hidden
    patches don't attend to each other (decoder "cross"), the subset has the same expected loss. The mask of a sample is
    a function of (seed, epoch, index).

    Attributes:
        mask_ratio: share of the patches that is hidden, in (0, 1).
        max_mask_ratio: hide a varying share, linear in the level, from mask_ratio at level 0 to this share at level 1;
            default: always mask_ratio.
        predict: share of the hidden patches that is predicted in training, in (0, 1]; less saves decoder time.
        norm_pix: normalize each target patch by its own mean and standard deviation.
    """

    infobatch: ClassVar = {"pruning.policy": "full"}  # choosing images saved nothing beside shorter training

    mask_ratio: float = 0.75
    max_mask_ratio: float | None = None
    predict: float = 1.0
    norm_pix: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")
        if self.max_mask_ratio is not None and not self.mask_ratio < self.max_mask_ratio < 1:
            raise ValueError(f"max_mask_ratio must be above mask_ratio and below 1, got {self.max_mask_ratio}")
        if not 0 < self.predict <= 1:
            raise ValueError(f"predict must be in (0, 1], got {self.predict}")

    def masks(self, patches: int, level: Tensor, rng: SampleRNG, share: float = 1.0) -> Masks:
        """The visible and hidden patches of a batch; `share` of the hidden ones is returned (see `random_masks`)."""
        return random_masks(patches, self.mask_ratio, self.max_mask_ratio, share, level, rng)

    def targets(self, patch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Targets [B, L, P] of patches [B, L, P], and the mean and scale [B, L, 1]: patch = target * scale + mean."""
        if not self.norm_pix:
            return patch, torch.zeros_like(patch[..., :1]), torch.ones_like(patch[..., :1])
        if patch.shape[-1] < 2:
            raise ValueError("norm_pix needs patches of two or more values; give --adapter.no-norm-pix")
        mean, scale = patch.mean(dim=-1, keepdim=True), (patch.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        return (patch - mean) / scale, mean, scale

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """The mean squared error over the predicted patches; in evaluation mode all hidden patches are predicted."""
        network = bare(model)
        share = self.predict if network.training else 1.0
        visible, hidden, valid = self.masks(network.patches, batch.level, rng, share)
        target, _, _ = self.targets(network.patchify(batch.image))
        predicted = model(batch.image, visible, hidden, valid)
        error = reduce((predicted - target.take_along_dim(hidden[..., None], 1)).square(), "b h p -> b h", "mean")
        if valid is None:
            return Losses(error.mean(dim=1))
        valid = valid[:, visible.shape[1] :]
        return Losses(torch.where(valid, error, 0.0).sum(dim=1) / valid.sum(dim=1))

    def reconstruct(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] with hidden patches 0, and completed; `norm_pix` is undone with the patches' own mean."""
        network = bare(model)
        visible, hidden, valid = self.masks(network.patches, batch.level, rng)
        patch = network.patchify(batch.image)
        _, mean, scale = self.targets(patch)
        index = hidden[..., None].expand(-1, -1, patch.shape[-1])
        predicted = torch.zeros_like(patch).scatter(1, index, model(batch.image, visible, hidden, valid).float())
        valid = torch.ones_like(visible).bool() if valid is None else valid[:, : visible.shape[1]]
        is_visible = torch.zeros_like(patch[..., :1], dtype=torch.bool).scatter(1, visible[..., None], valid[..., None])
        completed = torch.where(is_visible, patch, predicted * scale + mean)
        return network.unpatchify(torch.where(is_visible, patch, 0.0)), network.unpatchify(completed)
