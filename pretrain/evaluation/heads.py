"""Classifiers made of an encoder: one to be fine-tuned, and a frozen one below an attentive head."""

from typing import Any, NamedTuple

import torch
from timm.layers import AttentionPoolLatent, trunc_normal_
from torch import Tensor, nn

from pretrain.adapters import bare
from pretrain.core.rng import SampleRNG


class Tuning(NamedTuple):
    """How an encoder is fine-tuned.

    Attributes:
        blocks: of encoders that this is for, at most.
        rate: peak learning rate for 256 images a step.
        layer_decay: what it is multiplied by from layer to layer downwards.
        drop_path: share of the samples that pass the last block by (Huang et al. 2016); less in earlier ones.
    """

    blocks: float
    rate: float
    layer_decay: float
    drop_path: float


# Of ViT-B, L and H: He et al. 2022, table 9, with the values of the release, where they differ.
TUNINGS = (Tuning(12, 5e-4, 0.65, 0.1), Tuning(24, 1e-3, 0.75, 0.2), Tuning(float("inf"), 1e-3, 0.75, 0.3))


class DropPath(nn.Module):
    """A residual branch that some samples go without: as in timm, but what is drawn belongs to the sample.

    So processes that share a step drop what one would, and no global generator is read.

    Args:
        rate: share of the samples that go without it.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.draws: SampleRNG | None = None  # of the samples of the batch that comes

    def forward(self, branch: Tensor) -> Tensor:
        """The branch [B, L, D], larger where it is kept, so that its mean is the same."""
        if not self.training or not self.rate:
            return branch
        assert self.draws is not None
        kept = self.draws.uniform(1, 1) >= self.rate
        return branch * kept / (1 - self.rate)


def tuning(encoder: Any) -> Tuning:
    """How an encoder of its depth is fine-tuned."""
    return next(known for known in TUNINGS if len(encoder.blocks) <= known.blocks)


def tunable(encoder: Any, classes: int) -> nn.Module:
    """A timm vision transformer made a classifier: of the mean of its patches, behind which its last norm goes."""
    encoder.requires_grad_(True).reset_classifier(classes, global_pool="avg")
    if isinstance(encoder.fc_norm, nn.Identity):
        encoder.norm, encoder.fc_norm = nn.Identity(), encoder.norm
    trunc_normal_(encoder.head.weight, std=2e-5)
    rates = torch.linspace(0, tuning(encoder).drop_path, len(encoder.blocks)).tolist()
    for block, rate in zip(encoder.blocks, rates, strict=True):
        for name in [name for name, _ in block.named_modules() if name.split(".")[-1].startswith("drop_path")]:
            block.set_submodule(name, DropPath(rate))
    return encoder


class Attentive(nn.Module):
    """A frozen encoder whose tokens one query attends to, and a linear map of what it gathers (Chen et al. 2022,
    "Context autoencoder", section 3.3).

    Args:
        encoder: a timm vision transformer.
        classes: to tell apart.
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        timm = bare(encoder)
        self.encoder = encoder.requires_grad_(False)
        self.pool = AttentionPoolLatent(timm.embed_dim, num_heads=timm.blocks[0].attn.num_heads)
        self.norm, self.head = nn.LayerNorm(timm.embed_dim), nn.Linear(timm.embed_dim, classes)

    def train(self, mode: bool = True) -> "Attentive":
        """The encoder stays as it is evaluated."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        with torch.no_grad():
            tokens = bare(self.encoder).forward_features(image)
        return self.head(self.norm(self.pool(tokens)))
