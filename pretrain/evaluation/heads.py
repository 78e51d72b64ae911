"""Classifiers on an encoder: for fine-tuning, and frozen under an attentive head."""

from typing import Any, NamedTuple

import torch
from timm.layers import AttentionPoolLatent, trunc_normal_
from torch import Tensor, nn

from pretrain.adapters import bare
from pretrain.core.rng import SampleRNG


class FineTuning(NamedTuple):
    """Settings of fine-tuning.

    Attributes:
        max_blocks: depth of the largest encoder that they are for.
        lr: peak learning rate.
        layer_decay: factor on the learning rate from each layer to the one below it.
        drop_path: share of samples that skip the last block (Huang et al. 2016); it rises linearly from 0 at the first.
    """

    max_blocks: float
    lr: float
    layer_decay: float
    drop_path: float


# Of ViT-B, L and H (He et al. 2022, table 9); where the released code differs, its values.
FINE_TUNING = (
    FineTuning(12, 5e-4, 0.65, 0.1),
    FineTuning(24, 1e-3, 0.75, 0.2),
    FineTuning(float("inf"), 1e-3, 0.75, 0.3),
)


class DropPath(nn.Module):
    """Skip a residual branch for some samples, as timm's DropPath, with random numbers that depend on the sample.

    So the result doesn't depend on the number of processes, and no global generator is used.

    Args:
        rate: share of the samples.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.rng: SampleRNG | None = None  # of the samples of the next batch

    def forward(self, branch: Tensor) -> Tensor:
        """The branch [B, L, D], 0 for dropped samples and divided by 1 - rate for the others."""
        if not self.training or not self.rate:
            return branch
        assert self.rng is not None
        kept = self.rng.uniform(1, 1) >= self.rate
        return branch * kept / (1 - self.rate)


def fine_tuning_settings(encoder: Any) -> FineTuning:
    """The settings for an encoder of this depth."""
    return next(settings for settings in FINE_TUNING if len(encoder.blocks) <= settings.max_blocks)


def as_classifier(encoder: Any, classes: int) -> nn.Module:
    """Turn a timm vision transformer into a classifier for fine-tuning, in place.

    The head is on the mean of the patch tokens; the encoder's last norm comes after the mean.
    """
    encoder.requires_grad_(True).reset_classifier(classes, global_pool="avg")
    if isinstance(encoder.fc_norm, nn.Identity):
        encoder.norm, encoder.fc_norm = nn.Identity(), encoder.norm
    trunc_normal_(encoder.head.weight, std=2e-5)
    rates = torch.linspace(0, fine_tuning_settings(encoder).drop_path, len(encoder.blocks)).tolist()
    for block, rate in zip(encoder.blocks, rates, strict=True):
        for name in [name for name, _ in block.named_modules() if name.split(".")[-1].startswith("drop_path")]:
            block.set_submodule(name, DropPath(rate))
    return encoder


class AttentiveProbe(nn.Module):
    """A frozen encoder, cross-attention of one learned query to its tokens, and a linear classifier (Chen et al. 2022,
    "Context autoencoder", section 3.3).

    Args:
        encoder: a timm vision transformer.
        classes: number of classes.
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        timm = bare(encoder)
        self.encoder = encoder.requires_grad_(False)
        self.pool = AttentionPoolLatent(timm.embed_dim, num_heads=timm.blocks[0].attn.num_heads)
        self.norm, self.head = nn.LayerNorm(timm.embed_dim), nn.Linear(timm.embed_dim, classes)

    def train(self, mode: bool = True) -> "AttentiveProbe":
        """Set the mode of the head; the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        with torch.no_grad():
            tokens = bare(self.encoder).forward_features(image)
        return self.head(self.norm(self.pool(tokens)))
