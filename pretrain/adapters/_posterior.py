"""Posterior-mean targets: the expected clean image given a noisy one, over the training set."""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_NOISE = 1e-2  # standard deviation; below it the posterior is the image alone, and float32 can't resolve it


class References(NamedTuple):
    """The training images, as a uniform prior over clean images.

    A noisy image x_t = a x + s noise comes from the training image x_j with the posterior probability w_j proportional
    to exp(-|x_t - a x_j|^2 / (2 s^2)). Replacing x in the target by the mean of the x_j under w does not change the
    expected gradient, and removes the variance of x given x_t (Bertrand et al., "On the closed-form of flow matching",
    2025, proposition 2; Xu et al., "Stable target field", 2023).

    The prior must be the distribution of the samples times their weights. Under every unbiased policy that is the
    uniform one over the whole training set, mirrored images included, not the samples of a pruned epoch or of a batch.

    Attributes:
        image: float32 [M, C * H * W].
        half_square: float32 [M]; |x_j|^2 / 2.
        label: int64 [M], for a network that is conditioned on labels: the references of an image are those of its
            class, or all if its label was dropped; None: without condition.
    """

    image: Tensor
    half_square: Tensor
    label: Tensor | None

    @classmethod
    def of(cls, image: Tensor, label: Tensor | None) -> "References":
        """Make references of images, [M, C, H, W], and labels, int64 [M]."""
        flat = image.flatten(1).float()
        return cls(flat, flat.square().sum(1) / 2, label)

    def weights(self, noisy: Tensor, signal: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """The posterior probabilities of the references, float32 [B, M]; see `means` for the arguments."""
        a, s = signal.float()[:, None], sigma.float().clamp(min=MIN_NOISE)[:, None]
        logits = (a * (noisy.flatten(1).float() @ self.image.T) - a.square() * self.half_square) / s.square()
        if self.label is not None:
            logits = logits.masked_fill((label[:, None] >= 0) & (label[:, None] != self.label), -torch.inf)
        return logits.softmax(1)

    @torch.no_grad()
    def means(
        self, image: Tensor, noise: Tensor, noisy: Tensor, signal: Tensor, sigma: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The posterior means of the image and of the noise, given the noisy image.

        Args:
            image: [B, C, H, W], without noise.
            noise: [B, C, H, W], standard normal numbers.
            noisy: signal * image + sigma * noise.
            signal, sigma: [B]; where `sigma` is below `MIN_NOISE`, `image` and `noise` are returned.
            label: int64 [B]; the condition of the network, -1 for none.

        Returns:
            Image and noise, float32 [B, C, H, W] each.
        """
        with torch.autocast(noisy.device.type, enabled=False):
            mean = (self.weights(noisy, signal, sigma, label) @ self.image).view_as(image)
        a, s = signal.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        certain = s < MIN_NOISE
        return torch.where(certain, image, mean), torch.where(certain, noise, (noisy - a * mean) / s.clamp(MIN_NOISE))
