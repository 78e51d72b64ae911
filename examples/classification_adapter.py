"""Image classification as an objective."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.adapters import Batch, Losses
from pretrain.core.rng import SampleRNG

DRAWS = 16  # of a share; at the mixup of 1 all are rejected once in 65,536


@dataclass(frozen=True)
class Classification:
    """Cross entropy; the score is that of the sample's own label without smoothing, close to 0 for learned samples.

    With mixup (Zhang et al., 2018) each sample is mixed with another one of its batch, and keeps a share of at least
    half: of two images that are mixed either way round, each is trained once as the larger part, so over uniform
    partners the objective is the usual one. The mixed loss is weighted by the weight of the sample whose share is
    larger. Given the partner, that is unbiased. But partners are samples of the batch, which InfoBatch has selected, so
    hard samples are partners more often than easy ones: the smaller part of the loss is not exactly unbiased.

    Attributes:
        smoothing: label smoothing, in [0, 1) (Szegedy et al., 2016).
        mixup: alpha of the beta distribution of the shares, in [0, 1]; 0: no mixup.

    Raises:
        ValueError: an attribute is out of its range.
    """

    smoothing: float = 0.1
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"adapter.smoothing must be in [0, 1), got {self.smoothing}")
        if not 0 <= self.mixup <= 1:
            raise ValueError(f"adapter.mixup must be in [0, 1], got {self.mixup}")

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """One forward pass; the labels of padding don't matter. Uses no levels."""
        label = batch.label.clamp(min=0)
        if not self.mixup:
            logits = model(batch.image).float()
            return Losses(self.loss(logits, label), score(logits, label))
        share, partner = larger_shares(rng, self.mixup), partners(rng)
        image = batch.image.lerp(batch.image[partner], (1 - share)[:, None, None, None])
        logits = model(image).float()
        loss = share * self.loss(logits, label) + (1 - share) * self.loss(logits, label[partner])
        return Losses(loss, score(logits, label))

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Cross entropy with label smoothing, float32 [B]."""
        return F.cross_entropy(logits, label, reduction="none", label_smoothing=self.smoothing)


def score(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy without label smoothing, float32 [B]."""
    return F.cross_entropy(logits.detach(), label, reduction="none")


def larger_shares(rng: SampleRNG, alpha: float) -> Tensor:
    """max(x, 1 - x), float32 [B], of x from a beta distribution with both parameters alpha, in (0, 1].

    By the method of Johnk (1964): u ** (1 / alpha) / (u ** (1 / alpha) + v ** (1 / alpha)) of uniform u and v for which
    that sum is at most 1.
    """
    u, v = rng.uniform(DRAWS, 2).double().clamp(min=1e-8).log().div(alpha).unbind(-1)
    total = torch.logaddexp(u, v)
    first = (total <= 0).int().argmax(dim=1, keepdim=True)
    x = (u - total).gather(1, first).squeeze(1).exp()
    return torch.maximum(x, 1 - x).float()


def partners(rng: SampleRNG) -> Tensor:
    """int64 [B]; for each sample another one of the batch, each once (itself in a batch of one): the next in a random
    cycle."""
    order = rng.uniform().argsort()
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def random_shifts(image: Tensor, rng: SampleRNG, pixels: int) -> Tensor:
    """Images, [B, C, H, W], moved by up to `pixels` either way along both axes: random crops after padding by black."""
    size, width = image.shape[0], 2 * pixels + 1
    rows, columns = (rng.uniform(2) * width).long().clamp(max=width - 1).unbind(1)
    row = (rows[:, None] + torch.arange(image.shape[2], device=image.device))[:, None, :, None]
    column = (columns[:, None] + torch.arange(image.shape[3], device=image.device))[:, None, None, :]
    padded = F.pad(image, (pixels,) * 4, value=-1.0)
    sample = torch.arange(size, device=image.device)[:, None, None, None]
    channel = torch.arange(image.shape[1], device=image.device)[None, :, None, None]
    return padded[sample, channel, row, column]
